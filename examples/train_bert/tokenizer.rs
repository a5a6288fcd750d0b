//! Texts as numbers of words.

use std::collections::HashMap;

/// The tokens that are no words, under BERT's names; their places are their numbers.
pub const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
pub const PAD: u32 = 0;
pub const UNKNOWN: u32 = 1;
pub const FIRST: u32 = 2;
pub const LAST: u32 = 3;
pub const MASK: u32 = 4;

/// The words of some texts.
pub struct Tokenizer {
    /// What each token stands for.
    pub vocabulary: Vec<String>,
    tokens: HashMap<String, u32>,
}

impl Tokenizer {
    /// Knows the words that occur at least `least` times, the most frequent ones first.
    pub fn new<'a>(texts: impl Iterator<Item = &'a str>, least: usize) -> Self {
        let mut counts: HashMap<String, usize> = HashMap::new();
        for word in texts.flat_map(words) {
            *counts.entry(word).or_default() += 1;
        }
        let mut known: Vec<_> = counts.into_iter().filter(|(_, count)| *count >= least).collect();
        known.sort_by(|(a, m), (b, n)| n.cmp(m).then(a.cmp(b)));
        let special = SPECIAL.iter().map(ToString::to_string);
        let vocabulary: Vec<String> =
            special.chain(known.into_iter().map(|known| known.0)).collect();
        let tokens =
            vocabulary.iter().zip(0..).map(|(word, token)| (word.clone(), token)).collect();
        Self { vocabulary, tokens }
    }

    /// `[CLS] words [SEP]`, the words cut to fit into `length`.
    pub fn encode(&self, text: &str, length: usize) -> Vec<u32> {
        let token = |word: String| self.tokens.get(&word).copied().unwrap_or(UNKNOWN);
        let words = words(text).into_iter().map(token).take(length - 2);
        [FIRST].into_iter().chain(words).chain([LAST]).collect()
    }
}

/// In lower case: runs of letters and digits, and every other character but spaces on its own.
fn words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut within = false;
    for c in text.chars().flat_map(char::to_lowercase) {
        let continues = within && c.is_alphanumeric();
        within = c.is_alphanumeric();
        match words.last_mut() {
            Some(word) if continues => word.push(c),
            _ if c.is_whitespace() => {}
            _ => words.push(c.into()),
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_runs_of_letters_and_single_signs() {
        assert_eq!(
            words(" It's Été,  2nd--ok"),
            ["it", "'", "s", "été", ",", "2nd", "-", "-", "ok"]
        );
        assert!(words(" \t").is_empty());
    }

    #[test]
    fn frequent_words_are_known_and_long_texts_cut() {
        let tokenizer = Tokenizer::new(["b a b", "b a c"].into_iter(), 2);
        assert_eq!(tokenizer.vocabulary[SPECIAL.len()..], ["b", "a"]);
        assert_eq!(tokenizer.encode("a b c", 8), [FIRST, 6, 5, UNKNOWN, LAST]);
        assert_eq!(tokenizer.encode("a b c", 4), [FIRST, 6, 5, LAST]);
        assert_eq!(tokenizer.encode("", 8), [FIRST, LAST]);
    }
}
