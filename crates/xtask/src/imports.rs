//! Which modules a crate's files name, read from their syntax.
//!
//! A path is followed through the file's own imports: after `use crate::vm;` the path `vm::exits::walk` is of
//! `vm::exits`. What is behind `#[cfg(test)]` does not count, nor does a `mod` declaration. Names that come by `*`
//! are not followed, but the import itself counts. What would let a file name another one unseen is noted as [`Target::Unseen`].

use anyhow::{Context, Result};
use proc_macro2::{TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, Item, UseTree};

/// A module by its path from the crate's root, which is empty for the root itself.
pub type Module = Vec<String>;

/// One place where a file names something.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// What is named: the module's path, or an outer crate's name alone.
    pub what: Target,
    /// In which line.
    pub line: usize,
}

/// What a path leads to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// A module of this crate.
    Own(Module),
    /// Another crate.
    Crate(String),
    /// A type of that module of this crate is given methods, by which others may come here without an import.
    Methods(Module),
    /// Code that this does not look at: why.
    Unseen(&'static str),
}

/// Which files count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// All.
    All,
    /// Not those of tests, which are another matter, nor programs, which are crates of their own.
    Library,
}

/// A file of a crate.
#[derive(Debug)]
pub struct File {
    /// Where it is.
    pub path: PathBuf,
    /// What it names, without itself.
    pub uses: BTreeSet<Use>,
}

/// The files of a crate, by module.
pub type Crate = BTreeMap<Module, File>;

/// Reads a crate from its `src` directory.
///
/// # Errors
///
/// A file that cannot be read or is no Rust.
pub fn read(src: &Path, which: Files) -> Result<Crate> {
    let mut sources = BTreeMap::new();
    collect(src, which, &mut Vec::new(), &mut sources)?;
    let modules: BTreeSet<Module> = sources.keys().cloned().collect();
    let mut files = Crate::new();
    for (module, path) in sources {
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let uses = uses(&text, &module, &modules).with_context(|| path.display().to_string())?;
        files.insert(module, File { path, uses });
    }
    Ok(files)
}

fn collect(
    directory: &Path,
    which: Files,
    module: &mut Module,
    sources: &mut BTreeMap<Module, PathBuf>,
) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    for entry in entries {
        let path = entry?.path();
        let Some(stem) = path.file_stem().and_then(|stem| stem.to_str()) else {
            continue;
        };
        if which == Files::Library && matches!(stem, "bin" | "tests") {
            continue;
        }
        if path.is_dir() {
            module.push(stem.to_owned());
            collect(&path, which, module, sources)?;
            module.pop();
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let mut of = module.clone();
            if !(module.is_empty() && matches!(stem, "main" | "lib")) {
                of.push(stem.to_owned());
            }
            sources.insert(of, path);
        }
    }
    Ok(())
}

/// What the text of `module` names.
fn uses(text: &str, module: &Module, modules: &BTreeSet<Module>) -> Result<BTreeSet<Use>> {
    let file = syn::parse_file(text)?;
    let mut reader = Reader {
        module,
        modules,
        names: BTreeMap::new(),
        uses: BTreeSet::new(),
    };
    // Imports first: a path may stand above the import that it goes through.
    let mut imports = Imports(Vec::new());
    imports.visit_file(&file);
    for (path, name, line) in imports.0 {
        let Some(path) = reader.absolute(&path) else {
            // An outer crate's.
            if let Some(outer) = path.first().filter(|name| *name != "self") {
                reader.note(Target::Crate(outer.clone()), line);
            }
            continue;
        };
        reader.note_path(&path, line);
        if let Some(name) = name {
            reader.names.insert(name, path);
        }
    }
    reader.visit_file(&file);
    Ok(reader.uses)
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .meta
                .require_list()
                .is_ok_and(|list| list.tokens.to_string() == "test")
    })
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Mod(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        _ => &[],
    }
}

/// All imports: the path, the name that it gets here, and the line.
struct Imports(Vec<(Vec<String>, Option<String>, usize)>);

impl Imports {
    fn add(&mut self, tree: &UseTree, before: &mut Vec<String>) {
        let line = tree.span().start().line;
        match tree {
            UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.add(&path.tree, before);
                before.pop();
            }
            UseTree::Name(name) => self.name(before, &name.ident.to_string(), None, line),
            UseTree::Rename(rename) => {
                let new = rename.rename.to_string();
                self.name(before, &rename.ident.to_string(), Some(new), line);
            }
            UseTree::Glob(_) => self.0.push((before.clone(), None, line)),
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.add(tree, before);
                }
            }
        }
    }

    fn name(&mut self, before: &[String], name: &str, new: Option<String>, line: usize) {
        let mut path = before.to_vec();
        if name != "self" {
            path.push(name.to_owned());
        }
        let new = new.or_else(|| path.last().cloned());
        self.0.push((path, new, line));
    }
}

impl<'ast> Visit<'ast> for Imports {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_test(attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add(&item.tree, &mut Vec::new());
    }
}

struct Reader<'a> {
    module: &'a Module,
    modules: &'a BTreeSet<Module>,
    /// What names that were imported stand for.
    names: BTreeMap<String, Module>,
    uses: BTreeSet<Use>,
}

impl Reader<'_> {
    /// A path from the crate's root; `None` if it is not this crate's.
    fn absolute(&self, path: &[String]) -> Option<Vec<String>> {
        let (first, rest) = path.split_first()?;
        let mut start = match first.as_str() {
            "crate" => Vec::new(),
            "self" => self.module.clone(),
            "super" => {
                let mut parent = self.module.clone();
                parent.pop();
                parent
            }
            name => match self.names.get(name) {
                Some(path) => path.clone(),
                None => {
                    let mut child = self.module.clone();
                    child.push(name.to_owned());
                    if !self.modules.contains(&child) {
                        return None;
                    }
                    child
                }
            },
        };
        for segment in rest {
            match segment.as_str() {
                "super" => drop(start.pop()),
                name => start.push(name.to_owned()),
            }
        }
        Some(start)
    }

    /// The innermost module on the path.
    fn innermost(&self, path: &[String]) -> Option<Module> {
        (0..=path.len())
            .rev()
            .map(|len| path[..len].to_vec())
            .find(|module| self.modules.contains(module))
    }

    /// Notes the innermost module on the path.
    fn note_path(&mut self, path: &[String], line: usize) {
        if let Some(module) = self.innermost(path) {
            self.note(Target::Own(module), line);
        }
    }

    fn note(&mut self, what: Target, line: usize) {
        if what != Target::Own(self.module.clone()) {
            self.uses.insert(Use { what, line });
        }
    }

    fn follow(&mut self, path: &[String], line: usize) {
        // One name alone is an item that was imported, which counted there, or one of this file.
        if path.len() < 2 {
            return;
        }
        match self.absolute(path) {
            Some(path) => self.note_path(&path, line),
            None if path[0].starts_with("tidemark_") => {
                self.note(Target::Crate(path[0].clone()), line);
            }
            None => {}
        }
    }

    /// Paths in a macro's arguments. `before` is what a group of paths has in front of it.
    fn tokens(&mut self, tokens: TokenStream, before: &[String]) {
        let mut path: Vec<String> = before.to_vec();
        let mut colons = if before.is_empty() { 0 } else { 2 };
        let mut line = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.follow(&path, line);
                        path = before.to_vec();
                    }
                    line = ident.span().start().line;
                    path.push(ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' && !path.is_empty() => {
                    colons += 1;
                }
                TokenTree::Group(group) => {
                    self.follow(&path, line);
                    let inside = if colons == 2 { &path[..] } else { &[] };
                    self.tokens(group.stream(), inside);
                    path = before.to_vec();
                    colons = if before.is_empty() { 0 } else { 2 };
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {
                    self.follow(&path, line);
                    path = before.to_vec();
                    colons = if before.is_empty() { 0 } else { 2 };
                }
            }
        }
        self.follow(&path, line);
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_test(attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_extern_crate(&mut self, item: &'ast syn::ItemExternCrate) {
        if item.ident != "alloc" || item.rename.is_some() {
            self.note(Target::Unseen("extern crate"), item.span().start().line);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let path = |attribute: &Attribute| attribute.path().is_ident("path");
        if item.attrs.iter().any(path) {
            self.note(Target::Unseen("#[path]"), item.span().start().line);
        }
        visit::visit_item_mod(self, item);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if item.trait_.is_none()
            && let syn::Type::Path(of) = &*item.self_ty
        {
            let path: Vec<String> = of
                .path
                .segments
                .iter()
                .map(|segment| segment.ident.to_string())
                .collect();
            if let Some(path) = self.absolute(&path)
                && let Some(module) = self.innermost(&path)
            {
                self.note(Target::Methods(module), item.span().start().line);
            }
        }
        visit::visit_item_impl(self, item);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string())
            .collect();
        self.follow(&segments, path.span().start().line);
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        if call.path.is_ident("include") {
            self.note(Target::Unseen("include!"), call.span().start().line);
        }
        self.tokens(call.tokens.clone(), &[]);
        visit::visit_macro(self, call);
    }
}

#[cfg(test)]
pub mod tests {
    use super::{Module, Target, uses};
    use std::collections::BTreeSet;

    /// The module that a path names.
    pub fn module(path: &str) -> Module {
        path.split("::")
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect()
    }

    /// What `text`, as the file of `vm::exits`, uses of a small crate.
    fn of(text: &str) -> Vec<String> {
        let modules: BTreeSet<Module> = [
            "",
            "arch",
            "arch::gic",
            "vm",
            "vm::exits",
            "vm::exits::walk",
            "sched",
        ]
        .into_iter()
        .map(module)
        .collect();
        let uses = uses(text, &module("vm::exits"), &modules).expect("it is Rust");
        let names: BTreeSet<String> = uses
            .into_iter()
            .map(|found| match found.what {
                Target::Own(path) => path.join("::"),
                Target::Crate(name) => format!("<{name}>"),
                Target::Methods(of) => format!("impl {}", of.join("::")),
                Target::Unseen(why) => format!("unseen {why}"),
            })
            .collect();
        names.into_iter().collect()
    }

    #[test]
    fn an_import_leads_to_the_innermost_module() {
        assert_eq!(of("use crate::arch::gic::{self, send};"), ["arch::gic"]);
        assert_eq!(of("use super::Vm;"), ["vm"]);
        assert_eq!(of("use crate::{arch, sched::pick};"), ["arch", "sched"]);
    }

    #[test]
    fn paths_go_through_imports_and_children() {
        assert_eq!(
            of("use crate::arch; fn f() { arch::gic::send(); }"),
            ["arch", "arch::gic"]
        );
        assert_eq!(
            of("mod walk; fn f() { walk::level(); }"),
            ["vm::exits::walk"]
        );
        assert_eq!(of("fn f() -> crate::sched::Decision { f() }"), ["sched"]);
        assert_eq!(
            of("use crate::arch as low; fn f() { low::gic::send(); }"),
            ["arch", "arch::gic"]
        );
    }

    #[test]
    fn paths_in_macros_count() {
        assert_eq!(
            of("fn f() { info!(\"{}\", crate::sched::count()); }"),
            ["sched"]
        );
        assert_eq!(
            of("fn f() { a!(b, (crate::arch::gic::x(), 1)); }"),
            ["arch::gic"]
        );
    }

    #[test]
    fn what_would_go_unseen_is_noted() {
        assert_eq!(
            of("use crate::sched::Queue; impl Queue { fn f() {} }"),
            ["impl sched", "sched"]
        );
        assert_eq!(of("extern crate self as me;"), ["unseen extern crate"]);
        assert!(of("extern crate alloc;").is_empty());
        assert_eq!(of("#[path = \"x.rs\"] mod x;"), ["unseen #[path]"]);
        assert_eq!(of("fn f() { include!(\"x.rs\") }"), ["unseen include!"]);
        assert_eq!(
            of("macro_rules! m { () => { use $crate::{sched::pick, arch}; } }"),
            ["arch", "sched"]
        );
        assert_eq!(of("#[cfg(testing)] use crate::sched;"), ["sched"]);
    }

    #[test]
    fn what_is_not_of_the_crate_is_its_crate() {
        assert_eq!(of("use tidemark_wire::message::VmId;"), ["<tidemark_wire>"]);
        assert_eq!(
            of("fn f() { tidemark_wire::frame::encode(); }"),
            ["<tidemark_wire>"]
        );
    }

    #[test]
    fn tests_declarations_and_the_file_itself_do_not_count() {
        assert!(of("#[cfg(test)] mod tests { use crate::sched; }").is_empty());
        assert!(of("mod walk;").is_empty());
        assert!(of("use self::Next::GoOn; enum Next { GoOn }").is_empty());
    }
}
