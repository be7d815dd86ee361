//! Names: memorable ones for runs (`calm-otter-3`), rules for those that people give, and prefixes.

use std::collections::BTreeMap;

/// Longest name of a run or a worker, in characters.
pub const MAX_NAME_LEN: usize = 64;

const ADJECTIVES: [&str; 64] = [
    "able", "agile", "amber", "ample", "azure", "bold", "brave", "brief", "bright", "brisk", "calm",
    "cheery", "civil", "clear", "clever", "cosy", "crisp", "deft", "eager", "early", "fair", "fancy",
    "fleet", "fond", "frank", "fresh", "gentle", "glad", "golden", "grand", "handy", "happy", "hardy",
    "honest", "humble", "jolly", "keen", "kind", "lively", "loyal", "lucid", "lucky", "mellow", "merry",
    "mild", "neat", "nimble", "noble", "patient", "plucky", "polite", "proud", "quick", "quiet", "rapid",
    "ready", "serene", "silver", "smart", "steady", "sunny", "swift", "tidy", "witty",
];

const ANIMALS: [&str; 64] = [
    "badger", "beaver", "bison", "bobcat", "camel", "condor", "coyote", "crane", "cricket", "curlew",
    "dingo", "dolphin", "donkey", "eagle", "egret", "falcon", "ferret", "finch", "fox", "gecko", "gibbon",
    "goose", "hare", "hedgehog", "heron", "ibex", "ibis", "jackdaw", "jaguar", "kestrel", "kiwi", "koala",
    "lark", "lemur", "linnet", "lion", "lizard", "llama", "lynx", "magpie", "marmot", "marten", "moose",
    "newt", "ocelot", "okapi", "osprey", "otter", "owl", "panda", "parrot", "pelican", "puffin", "rabbit",
    "raven", "robin", "salmon", "seal", "sparrow", "stoat", "swan", "tapir", "walrus", "wombat",
];

/// Why a name does not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Other characters than allowed, or too many, or none.
    #[error("'{name}' is no usable {what}: use 1 to {MAX_NAME_LEN} lower-case letters, digits and hyphens")]
    Malformed {
        /// "run name" or "worker name".
        what: &'static str,
        /// As given.
        name: String,
    },
    /// No run's name starts so.
    #[error("there is no run '{prefix}'; 'takuma run ls' lists the runs")]
    Unknown {
        /// As given.
        prefix: String,
    },
    /// More than one run's name starts so.
    #[error("'{prefix}' could be {candidates}; type more of the name")]
    Ambiguous {
        /// As given.
        prefix: String,
        /// Some of the runs it could be, in words.
        candidates: String,
    },
}

/// Checks a name that a person gave.
///
/// # Errors
/// [`NameError::Malformed`].
pub fn check(what: &'static str, name: &str) -> Result<(), NameError> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if (1..=MAX_NAME_LEN).contains(&name.len()) && name.chars().all(allowed) {
        return Ok(());
    }
    Err(NameError::Malformed { what, name: name.chars().take(2 * MAX_NAME_LEN).collect() })
}

/// A memorable name that is not taken, from random bits.
#[must_use]
pub fn memorable(random: u64, taken: impl Fn(&str) -> bool) -> String {
    let adjective = ADJECTIVES[(random % 64) as usize];
    let animal = ANIMALS[(random / 64 % 64) as usize];
    let first = random / 4096 % 9 + 1;
    (first..)
        .map(|number| format!("{adjective}-{animal}-{number}"))
        .find(|name| !taken(name))
        .expect("fewer than 2^64 names are taken")
}

/// The key that equals `prefix`, or the only one that starts with it.
///
/// # Errors
/// [`NameError::Unknown`] or [`NameError::Ambiguous`].
pub fn resolve<'a, T>(runs: &'a BTreeMap<String, T>, prefix: &str) -> Result<&'a str, NameError> {
    if let Some((name, _)) = runs.get_key_value(prefix) {
        return Ok(name);
    }
    let mut matches = runs.range(prefix.to_owned()..).map(|(name, _)| name.as_str());
    let mut matches = matches.by_ref().take_while(|name| !prefix.is_empty() && name.starts_with(prefix));
    let Some(only) = matches.next() else { return Err(NameError::Unknown { prefix: prefix.to_owned() }) };
    let Some(second) = matches.next() else { return Ok(only) };
    let mut candidates = format!("{only}, {second}");
    if let Some(third) = matches.next() {
        candidates = format!("{candidates}, {third}");
    }
    let left = matches.count();
    if left > 0 {
        candidates = format!("{candidates} and {left} more");
    }
    Err(NameError::Ambiguous { prefix: prefix.to_owned(), candidates })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn runs(names: &[&str]) -> BTreeMap<String, ()> {
        names.iter().map(|&name| (name.to_owned(), ())).collect()
    }

    #[test]
    fn words_are_distinct_and_usable_in_names() {
        let words: HashSet<&str> = ADJECTIVES.iter().chain(&ANIMALS).copied().collect();
        assert_eq!(words.len(), 128);
        assert!(words.iter().all(|word| check("run name", word).is_ok()));
    }

    #[test]
    fn taken_name_gets_the_next_number() {
        let first = memorable(7, |_| false);
        let second = memorable(7, |name| name == first);
        assert_ne!(first, second);
        assert_eq!(first.rsplit_once('-').unwrap().0, second.rsplit_once('-').unwrap().0);
    }

    #[test]
    fn unique_prefix_is_enough_and_a_full_name_wins() {
        let runs = runs(&["calm-fox-1", "calm-otter-1", "calm-otter-12"]);
        assert_eq!(resolve(&runs, "calm-f"), Ok("calm-fox-1"));
        assert_eq!(resolve(&runs, "calm-otter-1"), Ok("calm-otter-1"));
    }

    #[test]
    fn ambiguous_prefix_names_the_candidates() {
        let runs = runs(&["a1", "a2", "a3", "a4", "b"]);
        let message = resolve(&runs, "a").unwrap_err().to_string();
        assert_eq!(message, "'a' could be a1, a2, a3 and 1 more; type more of the name");
        assert_eq!(resolve(&runs, "c"), Err(NameError::Unknown { prefix: "c".into() }));
        assert_eq!(resolve(&runs, ""), Err(NameError::Unknown { prefix: String::new() }));
    }

    #[test]
    fn names_with_other_characters_are_refused() {
        for bad in ["", "Calm", "a b", "../x", "a/b", &"x".repeat(65)] {
            assert!(check("run name", bad).is_err(), "{bad}");
        }
    }
}
