//! What a filter of tests finds: one that finds nothing is a mistake, not a success.

/// Fails if none of `names` is one that libtest would run for `filter`.
///
/// # Errors
/// Says what was asked for, and where names are shown.
pub fn check<'n>(
    filter: Option<&str>,
    exact: Exact,
    names: impl IntoIterator<Item = &'n str>,
) -> Result<(), String> {
    let Some(filter) = filter else {
        return Ok(());
    };
    let found = names.into_iter().any(|name| match exact {
        Exact::Whole => name == filter,
        Exact::Part => name.contains(filter),
    });
    if found {
        return Ok(());
    }
    Err(format!(
        "no test is called {filter:?}; `--list` shows what there is"
    ))
}

/// What a name has to have in common with the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exact {
    /// Everything: `--exact`.
    Whole,
    /// It is in it.
    Part,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_finds_nothing_is_an_error() {
        let names = ["boot", "copy_16m"];
        assert_eq!(check(None, Exact::Part, names), Ok(()));
        assert_eq!(check(Some("copy"), Exact::Part, names), Ok(()));
        assert_eq!(check(Some("boot"), Exact::Whole, names), Ok(()));
        for (filter, exact) in [("nosuch", Exact::Part), ("copy", Exact::Whole)] {
            let error = check(Some(filter), exact, names).expect_err("nothing is found");
            assert!(error.contains(filter), "{error}");
        }
    }
}
