//! A text as tokens, a character each, and the windows of it that a model is shown.

use anyhow::{Result, ensure};

/// A text, split by position: nine tenths to train on, then one tenth to validate.
pub struct Text {
    /// The characters that occur, sorted: their places are the tokens.
    pub vocabulary: Vec<char>,
    pub train: Vec<u32>,
    pub validation: Vec<u32>,
}

impl Text {
    /// Of a text whose parts are both longer than `context`.
    pub fn new(text: &str, context: usize) -> Result<Self> {
        let mut vocabulary: Vec<char> = text.chars().collect();
        vocabulary.sort_unstable();
        vocabulary.dedup();
        let token = |c| vocabulary.binary_search(&c).expect("a character of the text") as u32;
        let mut train: Vec<u32> = text.chars().map(token).collect();
        let characters = train.len();
        let validation = train.split_off(characters * 9 / 10);
        ensure!(
            train.len() > context && validation.len() > context,
            "--data: a text of {characters} characters, of which a tenth must be longer than the context, {context}"
        );
        Ok(Self { vocabulary, train, validation })
    }

    /// The characters of tokens.
    pub fn decode(&self, tokens: &[u32]) -> String {
        tokens.iter().map(|&token| self.vocabulary[token as usize]).collect()
    }
}

/// This project's documents as they were on 2026-11-26: a text so small that a minute's training begins to learn it by heart.
pub const OWN_DOCUMENTS: &str = include_str!("documents.txt");

/// A text as a terminal shows it: no character of it moves the cursor, rings or turns the writing round.
pub fn printable(text: &str) -> String {
    let harmless = |c: char| {
        let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        matches!(c, '\n' | '\t') || !(c.is_control() || turns)
    };
    let show = |c: char| if harmless(c) { c.to_string() } else { c.escape_unicode().to_string() };
    text.chars().map(show).collect()
}

/// Where windows of `context` tokens that each have a next one begin, evenly over the text: at most `count`, none overlapping.
pub fn even_windows(tokens: usize, context: usize, count: usize) -> Vec<usize> {
    let count = count.min((tokens - 1) / context).max(1);
    let last = tokens - 1 - context;
    (0..count).map(|i| i * last / (count - 1).max(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_tenth_is_held_out_and_tokens_are_places_of_characters() {
        let text = Text::new("badcébadcébadcébadcé", 1).unwrap();
        assert_eq!(text.vocabulary, ['a', 'b', 'c', 'd', 'é']);
        assert_eq!(text.train, [1, 0, 3, 2, 4, 1, 0, 3, 2, 4, 1, 0, 3, 2, 4, 1, 0, 3]);
        assert_eq!(text.decode(&text.validation), "cé");
        assert!(Text::new("badcébadcébadcébadcé", 2).is_err());
        assert!(Text::new("", 1).is_err());
    }

    #[test]
    fn even_windows_fit_do_not_overlap_and_reach_both_ends() {
        for (tokens, context, count) in [(101, 10, 10), (101, 10, 100), (1000, 10, 7), (11, 10, 5)]
        {
            let windows = even_windows(tokens, context, count);
            assert_eq!(windows.len(), count.min((tokens - 1) / context));
            assert!(windows.windows(2).all(|pair| pair[0] + context <= pair[1]), "{windows:?}");
            assert_eq!(windows[0], 0);
            assert!(windows.len() == 1 || windows.last() == Some(&(tokens - 1 - context)));
        }
    }

    #[test]
    fn what_is_printed_leaves_the_terminal_alone() {
        assert_eq!(printable("a\tb\\ \"é\"\n"), "a\tb\\ \"é\"\n");
        assert_eq!(
            printable("\x1b[2J\r\u{7}\u{9b}\u{202e}"),
            "\\u{1b}[2J\\u{d}\\u{7}\\u{9b}\\u{202e}"
        );
    }
}
