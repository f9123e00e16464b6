//! A picture of where a guest writes.
//!
//! One cell is a number of pages, in address order from left to right and top to bottom, each
//! slot beginning a row of its own. Its colour is how often its pages were dirty, over all
//! rounds added: from dark (never) through red to light (every page in every round), on a
//! logarithmic scale, so that a page that was written once is still seen beside a busy one.

mod font;

use crate::bitmaps::{Bitmaps, SlotBitmap};
use crate::units::size;
use crate::{Error, Result};
use std::io;
use tidemark_wire::PAGE_SIZE;
use tidemark_wire::message::SlotId;

/// Cells in a row.
const COLUMNS: u64 = 128;
/// Most rows of all slots together, roughly: cells grow until they fit.
const ROWS: u64 = 128;
/// Side of a cell in pixels.
const CELL: usize = 6;
/// Space around everything.
const MARGIN: usize = 12;
/// Width of the addresses at the left.
const ADDRESSES: usize = 10 * font::ADVANCE + 8;
/// Height of the title.
const TITLE: usize = 2 * font::LINE + 6;
/// Height of the legend below.
const LEGEND: usize = 40;
/// Rows between addresses.
const ADDRESS_EVERY: usize = 8;

const BACKGROUND: Rgb = [16, 18, 24];
const INK: Rgb = [205, 210, 220];
const NEVER: Rgb = [34, 38, 50];

type Rgb = [u8; 3];

/// Dirty pages counted over rounds.
#[derive(Clone, Debug)]
pub struct Heatmap {
    title: String,
    pages_per_cell: u64,
    slots: Vec<SlotHeat>,
    rounds: u64,
}

#[derive(Clone, Debug)]
struct SlotHeat {
    slot: SlotId,
    base_ipa: u64,
    pages: u64,
    /// Dirty pages found in each cell, over all rounds.
    cells: Vec<u64>,
}

impl Heatmap {
    /// Starts a picture of these slots.
    #[must_use]
    pub fn for_slots(title: &str, slots: &[SlotBitmap]) -> Self {
        let total: u64 = slots.iter().map(|slot| slot.pages).sum();
        let pages_per_cell = total.div_ceil(COLUMNS * ROWS).max(1).next_power_of_two();
        let heat = |slot: &SlotBitmap| SlotHeat {
            slot: slot.slot,
            base_ipa: slot.base_ipa,
            pages: slot.pages,
            cells: vec![0; slot.pages.div_ceil(pages_per_cell) as usize],
        };
        let slots = slots.iter().map(heat).collect();
        Self {
            title: title.into(),
            pages_per_cell,
            slots,
            rounds: 0,
        }
    }

    /// Pages in a cell.
    #[must_use]
    pub fn pages_per_cell(&self) -> u64 {
        self.pages_per_cell
    }

    /// Rounds added.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Adds a round. Slots that are not in the picture are left out.
    pub fn add(&mut self, bitmaps: &Bitmaps) {
        self.rounds += 1;
        for bits in &bitmaps.slots {
            let Some(heat) = self.slots.iter_mut().find(|heat| heat.slot == bits.slot) else {
                continue;
            };
            for run in bits.runs() {
                let (mut at, end) = (run.start, run.start + run.len);
                while at < end {
                    let cell = at / self.pages_per_cell;
                    let next = ((cell + 1) * self.pages_per_cell).min(end);
                    if let Some(count) = heat.cells.get_mut(cell as usize) {
                        *count += next - at;
                    }
                    at = next;
                }
            }
        }
    }

    /// Heat of a cell, 0 to 1: dirty pages over the most there could be.
    fn heat(&self, heat: &SlotHeat, cell: usize) -> f64 {
        let first = cell as u64 * self.pages_per_cell;
        let most = heat.pages.saturating_sub(first).min(self.pages_per_cell) * self.rounds;
        let count = heat.cells.get(cell).copied().unwrap_or(0);
        if most == 0 {
            0.0
        } else {
            count as f64 / most as f64
        }
    }

    /// Draws it.
    ///
    /// # Errors
    /// [`Error::Local`] if the encoder fails.
    pub fn to_png(&self) -> Result<Vec<u8>> {
        let rows: usize = self.slots.iter().map(SlotHeat::rows).sum();
        // A free row between slots.
        let gaps = self.slots.len().saturating_sub(1);
        let width = MARGIN * 2 + ADDRESSES + COLUMNS as usize * CELL;
        let height = MARGIN * 2 + TITLE + (rows + gaps) * CELL + LEGEND;
        let mut canvas = Canvas::new(width, height);
        self.draw_title(&mut canvas);
        let mut top = MARGIN + TITLE;
        for heat in &self.slots {
            self.draw_slot(&mut canvas, heat, top);
            top += (heat.rows() + 1) * CELL;
        }
        draw_legend(&mut canvas, height - MARGIN - LEGEND + 14);
        canvas.to_png()
    }

    fn draw_title(&self, canvas: &mut Canvas) {
        let counted: u64 = self.slots.iter().flat_map(|slot| &slot.cells).sum();
        canvas.text(MARGIN, MARGIN, &format!("dirty pages of {}", self.title));
        let line = format!(
            "{} rounds, {counted} dirty pages counted, 1 cell = {}, 1 row = {}",
            self.rounds,
            size(self.pages_per_cell * PAGE_SIZE),
            size(self.pages_per_cell * PAGE_SIZE * COLUMNS),
        );
        canvas.text(MARGIN, MARGIN + font::LINE, &line);
    }

    fn draw_slot(&self, canvas: &mut Canvas, heat: &SlotHeat, top: usize) {
        for row in (0..heat.rows()).step_by(ADDRESS_EVERY) {
            let into = row as u64 * COLUMNS * self.pages_per_cell * PAGE_SIZE;
            let address = format!("{:>10x}", heat.base_ipa.saturating_add(into));
            canvas.text(MARGIN, top + row * CELL, &address);
        }
        for cell in 0..heat.cells.len() {
            let (row, column) = (cell / COLUMNS as usize, cell % COLUMNS as usize);
            let left = MARGIN + ADDRESSES + column * CELL;
            canvas.fill(
                left,
                top + row * CELL,
                CELL - 1,
                CELL - 1,
                colour(self.heat(heat, cell)),
            );
        }
    }
}

impl SlotHeat {
    fn rows(&self) -> usize {
        self.cells.len().div_ceil(COLUMNS as usize)
    }
}

fn draw_legend(canvas: &mut Canvas, top: usize) {
    let left = MARGIN + ADDRESSES;
    let width = 400;
    canvas.text(MARGIN, top + 2, "dirty");
    canvas.fill(left, top, 10, 10, NEVER);
    canvas.text(left, top + 14, "0");
    let start = left + 24;
    for x in 0..width {
        let position = x as f64 / (width - 1) as f64;
        canvas.fill(start + x, top, 1, 10, ramp(position));
    }
    for share in [0.001, 0.01, 0.1, 1.0] {
        let x = start + (position(share) * (width - 1) as f64) as usize;
        canvas.fill(x, top + 10, 1, 3, INK);
        let label = format!("{}%", share * 100.0);
        canvas.text(
            x.saturating_sub(label.len() * font::ADVANCE / 2),
            top + 14,
            &label,
        );
    }
    canvas.text(start + width + 24, top + 2, "of page x round");
}

fn colour(heat: f64) -> Rgb {
    if heat <= 0.0 {
        NEVER
    } else {
        ramp(position(heat))
    }
}

/// Place of a share on the scale: 0.1 % and less at the beginning, all at the end.
fn position(share: f64) -> f64 {
    (1.0 + share.max(0.001).log10() / 3.0).clamp(0.0, 1.0)
}

/// Dark violet through red and orange to pale yellow, always growing lighter.
fn ramp(position: f64) -> Rgb {
    const STOPS: [[f64; 3]; 6] = [
        [58.0, 28.0, 92.0],
        [122.0, 32.0, 110.0],
        [190.0, 52.0, 82.0],
        [235.0, 98.0, 42.0],
        [250.0, 172.0, 48.0],
        [252.0, 250.0, 190.0],
    ];
    let place = position.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let index = (place as usize).min(STOPS.len() - 2);
    let share = place - index as f64;
    let (from, to) = (STOPS[index], STOPS[index + 1]);
    [0, 1, 2].map(|i: usize| (from[i] + (to[i] - from[i]) * share).round() as u8)
}

/// Pixels.
struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            pixels: BACKGROUND.repeat(width * height),
        }
    }

    /// Fills a rectangle; what lies outside is left out.
    fn fill(&mut self, left: usize, top: usize, width: usize, height: usize, colour: Rgb) {
        for y in top..(top + height).min(self.height) {
            for x in left..(left + width).min(self.width) {
                let at = (y * self.width + x) * 3;
                if let Some(pixel) = self.pixels.get_mut(at..at + 3) {
                    pixel.copy_from_slice(&colour);
                }
            }
        }
    }

    fn text(&mut self, left: usize, top: usize, text: &str) {
        for (index, c) in text.chars().enumerate() {
            let left = left + index * font::ADVANCE;
            for (x, y) in font::dots(c) {
                self.fill(left + x, top + y, 1, 1, INK);
            }
        }
    }

    fn to_png(&self) -> Result<Vec<u8>> {
        let wrap = |error: png::EncodingError| Error::Local {
            what: "drawing a heat map",
            source: io::Error::other(error),
        };
        let mut out = Vec::new();
        let mut encoder = png::Encoder::new(&mut out, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(wrap)?;
        writer.write_image_data(&self.pixels).map_err(wrap)?;
        writer.finish().map_err(wrap)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_wire::message::Epoch;

    fn slot(pages: u64, set: &[u64]) -> SlotBitmap {
        let mut bits = SlotBitmap::new(SlotId(0), 0x4000_0000, pages).expect("a possible slot");
        set.iter().for_each(|&page| bits.set(page));
        bits
    }

    /// Decodes a picture and returns a pixel reader.
    fn decoded(bytes: &[u8]) -> (usize, usize, Vec<u8>) {
        let decoder = png::Decoder::new(io::Cursor::new(bytes));
        let mut reader = decoder.read_info().expect("a picture");
        let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
        let info = reader.next_frame(&mut pixels).expect("a picture");
        (info.width as usize, info.height as usize, pixels)
    }

    #[test]
    fn cells_show_what_was_dirty() {
        let first = slot(300, &[0, 1, 129]);
        let mut map = Heatmap::for_slots("t", std::slice::from_ref(&first));
        assert_eq!(map.pages_per_cell(), 1);
        map.add(&Bitmaps {
            epoch: Epoch(1),
            slots: vec![first],
        });
        map.add(&Bitmaps {
            epoch: Epoch(2),
            slots: vec![slot(300, &[0])],
        });
        let (width, height, pixels) = decoded(&map.to_png().expect("it draws"));
        assert_eq!(pixels.len(), width * height * 3);
        let cell = |n: usize| {
            let x = MARGIN + ADDRESSES + n % 128 * CELL;
            let y = MARGIN + TITLE + n / 128 * CELL;
            let at = (y * width + x) * 3;
            <[u8; 3]>::try_from(&pixels[at..at + 3]).expect("a pixel")
        };
        assert_eq!(cell(0), ramp(1.0), "in every round");
        assert_eq!(cell(1), colour(0.5), "in half of them");
        assert_eq!(cell(129), colour(0.5), "in the second row");
        assert_eq!(cell(2), NEVER);
        assert_eq!(cell(299), NEVER, "the last one is drawn");
        assert_eq!(cell(300), BACKGROUND, "and none after it");
    }

    #[test]
    fn big_guests_have_big_cells() {
        let map = Heatmap::for_slots("t", &[slot(131_072, &[])]);
        assert_eq!(map.pages_per_cell(), 8);
        let map = Heatmap::for_slots("t", &[slot(1 << 24, &[]), slot(5, &[])]);
        assert_eq!(map.pages_per_cell(), 2048);
        assert!(map.to_png().is_ok());
    }

    #[test]
    fn runs_fill_cells_to_their_edges() {
        let pages: Vec<u64> = (5..30).collect();
        let bits = slot(1 << 16, &pages);
        let mut map = Heatmap::for_slots("t", std::slice::from_ref(&bits));
        assert_eq!(map.pages_per_cell(), 4);
        map.add(&Bitmaps {
            epoch: Epoch(1),
            slots: vec![bits],
        });
        assert_eq!(map.slots[0].cells[..9], [0, 3, 4, 4, 4, 4, 4, 2, 0]);
    }

    #[test]
    fn scale_grows_lighter() {
        let light = |rgb: Rgb| rgb.iter().map(|&c| u32::from(c)).sum::<u32>();
        let lights: Vec<u32> = (0..=100)
            .map(|i| light(ramp(f64::from(i) / 100.0)))
            .collect();
        assert!(lights.windows(2).all(|pair| pair[0] <= pair[1]));
        assert!(light(NEVER) < lights[0]);
        assert_eq!(
            (position(0.0), position(0.001), position(1.0)),
            (0.0, 0.0, 1.0)
        );
    }

    #[test]
    fn no_slots_at_all_is_still_a_picture() {
        assert!(Heatmap::for_slots("nothing", &[]).to_png().is_ok());
    }
}
