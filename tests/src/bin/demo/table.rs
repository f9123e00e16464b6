//! The table of rounds on standard output, and the bar below it on a terminal.

use std::io::{IsTerminal, Write};

use tidectl::bitmaps::Bitmaps;

use crate::rounds::Round;

/// Cells of a round's picture of the guest's memory.
const CELLS: u64 = 32;

/// Width of the bar.
const BAR: usize = 20;

/// Prints the head of the table.
pub fn head() {
    println!(
        "   {:<6} {:>5} {:>12} {:>9} {:>9} {:>8} {:>9} {:>10}  where in its memory",
        "engine", "round", "dirty pages", "MiB/s", "faults", "splits", "harvest", "line"
    );
}

/// Prints one round.
pub fn row(round: &Round, bitmaps: &Bitmaps) {
    println!(
        "   {:<6} {:>5} {:>12} {:>9.1} {:>9} {:>8} {:>6.1} ms {:>6.1} KiB  {}",
        round.engine,
        round.number,
        round.pages,
        round.rate(),
        round.faults,
        round.splits,
        round.harvest_time.as_secs_f64() * 1e3,
        round.line_bytes as f64 / 1024.0,
        strip(bitmaps)
    );
}

/// The guest's memory from its first page to its last, each cell as full as its part is
/// dirty.
fn strip(bitmaps: &Bitmaps) -> String {
    let total: u64 = bitmaps.slots.iter().map(|slot| slot.pages).sum();
    let mut cells = [0u64; CELLS as usize];
    let mut before = 0;
    for slot in &bitmaps.slots {
        for run in slot.runs() {
            for page in run.start..run.start + run.len {
                let cell = ((before + page) * CELLS).checked_div(total).unwrap_or(0);
                if let Some(cell) = cells.get_mut(cell as usize) {
                    *cell += 1;
                }
            }
        }
        before += slot.pages;
    }
    let full = (total / CELLS).max(1);
    cells.iter().map(|&dirty| shade(dirty, full)).collect()
}

/// A block as high as the share of dirty pages; one page already shows.
fn shade(dirty: u64, full: u64) -> char {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    if dirty == 0 {
        return '·';
    }
    let eighth = (dirty * 8 / full).min(7) as usize;
    BLOCKS.get(eighth).copied().unwrap_or('█')
}

/// Shows how far the wait for a round is, where somebody watches.
pub fn progress(number: u32, count: u32, share: f64) {
    if !std::io::stdout().is_terminal() {
        return;
    }
    let filled = ((share * BAR as f64) as usize).min(BAR);
    let bar: String = (0..BAR)
        .map(|cell| if cell < filled { '=' } else { ' ' })
        .collect();
    print!("\r   round {number} of {count} [{bar}] the guest writes");
    let _ = std::io::stdout().flush();
}

/// Takes the bar away again.
pub fn clear_progress() {
    if std::io::stdout().is_terminal() {
        print!("\r{:60}\r", "");
        let _ = std::io::stdout().flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidectl::bitmaps::SlotBitmap;
    use tidemark_wire::message::{Epoch, SlotId};

    #[test]
    fn a_cell_is_as_full_as_its_part_is_dirty() {
        let mut slot = SlotBitmap::new(SlotId(0), 0x4000_0000, 3200).expect("slot");
        (0..100).for_each(|page| slot.set(page));
        slot.set(3199);
        let bitmaps = Bitmaps {
            epoch: Epoch(1),
            slots: vec![slot],
        };
        let strip = strip(&bitmaps);
        assert_eq!(strip.chars().next(), Some('█'));
        assert_eq!(strip.chars().last(), Some('▁'));
        assert_eq!(strip.chars().filter(|&cell| cell == '·').count(), 30);
    }
}
