//! The rooms of the image, which of them may use which, and circles anywhere.
//!
//! ARCHITECTURE.md says what each room is for. A lower room returns what is to be done; it never names a higher one.

use crate::imports::{self, Crate, Files, Module, Target};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

/// From the bottom up. Each may use what stands before it.
const ROOMS: &[&str] = &[
    "arch", "mm", "platform", "task", "vm", "sched", "control", "host", "entry",
];
/// The bring-up and the end: they may use all rooms, and no room uses them.
const ABOVE: &[&str] = &["", "smp", "crash"];
/// Crates that not every room may name, and which may.
const CRATES: &[(&str, &[&str])] = &[
    ("tidemark_a64", &["vm"]),
    ("tidemark_errata", &["arch"]),
    ("tidemark_lease", &["host"]),
    (
        "tidemark_sched",
        &["vm", "sched", "control", "host", "entry"],
    ),
];
/// Crates, by their directories, whose modules must have no circles either.
const WITHOUT_CIRCLES: &[&str] = &[
    "crates/a64",
    "crates/devices",
    "crates/errata",
    "crates/guests",
    "crates/lease",
    "crates/mkimage",
    "crates/orders",
    "crates/ownership",
    "crates/sched",
    "crates/tidectl",
    "crates/wire",
    "crates/xtask",
];

/// What a check found.
#[derive(Debug, Default)]
pub struct Found {
    /// What is wrong, a line each.
    pub wrong: Vec<String>,
    /// How often a room names another.
    uses: BTreeMap<(String, String), usize>,
}

impl Found {
    /// Who uses whom, a line each.
    pub fn uses(&self) -> String {
        let mut text = String::new();
        for ((from, to), count) in &self.uses {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{from:9} -> {to:9} {count:4}");
        }
        text
    }
}

/// Checks the project in `directory`.
///
/// # Errors
///
/// A file that cannot be read or is no Rust.
pub fn check(directory: &Path) -> Result<Found> {
    let mut found = Found::default();
    let image = imports::read(&directory.join("src"), Files::All)?;
    rooms(&image, &mut found);
    circles(&image, "src", &mut found);
    for name in WITHOUT_CIRCLES {
        let files = imports::read(&directory.join(name).join("src"), Files::Library)?;
        circles(&files, name, &mut found);
    }
    Ok(found)
}

/// The room of a module: its first name, empty for the root.
fn room(module: &Module) -> &str {
    module.first().map_or("", String::as_str)
}

fn rank(room: &str) -> Option<usize> {
    ROOMS.iter().position(|name| *name == room)
}

/// Imports that go up or sideways, modules in no room, and crates that a room may not name.
fn rooms(image: &Crate, found: &mut Found) {
    for (module, file) in image {
        let from = room(module);
        let above = ABOVE.contains(&from);
        if rank(from).is_none() && !above {
            found.wrong.push(format!(
                "{}: src/{from} is no room; crates/xtask/src/rooms.rs has the list",
                file.path.display()
            ));
            continue;
        }
        for used in &file.uses {
            let place = format!("{}:{}", file.path.display(), used.line);
            match &used.what {
                Target::Own(to) if room(to) == from => {}
                Target::Own(to) => {
                    let to = room(to);
                    *found
                        .uses
                        .entry((from.to_owned(), to.to_owned()))
                        .or_default() += 1;
                    let goes_down =
                        rank(to).is_some_and(|to| rank(from).is_none_or(|from| to < from));
                    if !goes_down && !above {
                        found
                            .wrong
                            .push(format!("{place}: `{from}` uses `{to}`, which is above it"));
                    }
                }
                Target::Methods(of) if room(of) == from => {}
                Target::Methods(of) => found.wrong.push(format!(
                    "{place}: `{from}` gives methods to a type of `{}`, by which that could come here",
                    room(of)
                )),
                Target::Unseen(why) => {
                    found.wrong.push(format!("{place}: nobody sees what {why} uses"));
                }
                Target::Crate(name) => {
                    let rule = CRATES.iter().find(|(other, _)| other == name);
                    if let Some((_, rooms)) = rule
                        && !rooms.contains(&from)
                        && !above
                    {
                        found
                            .wrong
                            .push(format!("{place}: only {rooms:?} may use {name}"));
                    }
                }
            }
        }
    }
}

/// Modules that use each other in a circle. A module in another's directory may use that one, which declares it: what is there
/// belongs to what the directory is named for.
fn circles(files: &Crate, name: &str, found: &mut Found) {
    let mut edges: BTreeMap<&Module, BTreeSet<&Module>> = BTreeMap::new();
    for (module, file) in files {
        for used in &file.uses {
            if let Target::Own(to) = &used.what
                && !module.starts_with(to)
            {
                edges.entry(module).or_default().insert(to);
            }
        }
    }
    for circle in components(&edges) {
        let modules: Vec<_> = circle.iter().map(|module| module.join("::")).collect();
        found.wrong.push(format!(
            "{name}: {} use each other in a circle",
            modules.join(", ")
        ));
    }
}

/// Sets of more than one node each of which reaches all others.
fn components<'a>(edges: &BTreeMap<&'a Module, BTreeSet<&'a Module>>) -> Vec<Vec<&'a Module>> {
    let reached = |from: &'a Module| {
        let mut seen = BTreeSet::new();
        let mut left = vec![from];
        while let Some(node) = left.pop() {
            for &next in edges.get(node).into_iter().flatten() {
                if seen.insert(next) {
                    left.push(next);
                }
            }
        }
        seen
    };
    let reach: BTreeMap<&Module, BTreeSet<&Module>> =
        edges.keys().map(|&node| (node, reached(node))).collect();
    let mut done = BTreeSet::new();
    let mut found = Vec::new();
    for (&node, reaches) in &reach {
        if done.contains(node) || !reaches.contains(node) {
            continue;
        }
        let circle: Vec<&Module> = reaches
            .iter()
            .copied()
            .filter(|other| reach.get(other).is_some_and(|back| back.contains(node)))
            .collect();
        done.extend(circle.iter().copied());
        found.push(circle);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{Found, circles, rooms};
    use crate::imports::tests::module;
    use crate::imports::{Crate, File, Target, Use};

    /// A crate of modules and what each uses; a name in `<>` is another crate's.
    fn of(files: &[(&str, &[&str])]) -> Crate {
        let target = |name: &str| match (name.strip_prefix('<'), name.strip_prefix("impl ")) {
            (Some(name), _) => Target::Crate(name.trim_end_matches('>').to_owned()),
            (None, Some(name)) => Target::Methods(module(name)),
            (None, None) if name == "unseen" => Target::Unseen("it"),
            (None, None) => Target::Own(module(name)),
        };
        files
            .iter()
            .map(|&(name, used)| {
                let uses = used.iter().map(|name| Use {
                    what: target(name),
                    line: 1,
                });
                let file = File {
                    path: name.into(),
                    uses: uses.collect(),
                };
                (module(name), file)
            })
            .collect()
    }

    fn wrong(files: &[(&str, &[&str])]) -> Vec<String> {
        let mut found = Found::default();
        let image = of(files);
        rooms(&image, &mut found);
        circles(&image, "src", &mut found);
        found.wrong
    }

    #[test]
    fn down_is_right_and_up_is_wrong() {
        assert!(wrong(&[("vm::exits", &["arch::gic", "mm"]), ("smp", &["entry"])]).is_empty());
        let up = wrong(&[("vm::exits", &["sched"])]);
        assert_eq!(up, ["vm::exits:1: `vm` uses `sched`, which is above it"]);
        assert_eq!(wrong(&[("entry::run", &["smp"])]).len(), 1);
        assert_eq!(wrong(&[("host", &[""])]).len(), 1);
    }

    #[test]
    fn methods_and_what_nobody_sees_are_no_way_up() {
        assert_eq!(wrong(&[("host", &["impl vm"])]).len(), 1);
        assert!(wrong(&[("vm::exits", &["impl vm"])]).is_empty());
        assert_eq!(wrong(&[("vm", &["unseen"])]).len(), 1);
    }

    #[test]
    fn every_file_is_in_a_room() {
        assert_eq!(wrong(&[("misc::things", &[])]).len(), 1);
    }

    #[test]
    fn some_crates_are_for_some_rooms() {
        assert!(wrong(&[("vm::exits", &["<tidemark_a64>"])]).is_empty());
        assert_eq!(wrong(&[("sched", &["<tidemark_a64>"])]).len(), 1);
    }

    #[test]
    fn circles_are_found_and_directories_are_none() {
        let circle = wrong(&[
            ("vm::a", &["vm::b"]),
            ("vm::b", &["vm::c"]),
            ("vm::c", &["vm::a"]),
            ("vm::d", &["vm::a"]),
        ]);
        assert_eq!(
            circle,
            ["src: vm::a, vm::b, vm::c use each other in a circle"]
        );
        assert!(wrong(&[("vm", &["vm::a"]), ("vm::a", &["vm"])]).is_empty());
        // By way of a part of one.
        let parts = wrong(&[
            ("vm::a", &["vm::b"]),
            ("vm::b", &["vm::b::c"]),
            ("vm::b::c", &["vm::a"]),
        ]);
        assert_eq!(parts.len(), 1);
    }
}
