//! A text as tokens, a character each, and the windows of it that a model is shown.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};

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
            "a text of {characters} characters: a tenth of it must be longer than the context, {context}"
        );
        Ok(Self { vocabulary, train, validation })
    }

    /// The characters of tokens.
    pub fn decode(&self, tokens: &[u32]) -> String {
        tokens.iter().map(|&token| self.vocabulary[token as usize]).collect()
    }
}

/// This project's documents, one file behind the other: a text so small that a minute's training begins to learn it by
/// heart.
pub fn own_documents() -> Result<String> {
    let paths = files(Path::new(env!("CARGO_MANIFEST_DIR")), "md")?;
    let texts = paths.iter().map(|path| {
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    });
    Ok(texts.collect::<Result<Vec<_>>>()?.concat())
}

/// The files of a folder with this ending, in order.
fn files(folder: &Path, ending: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| {
        let folder = folder.display();
        format!("cannot read this project's documents in {folder} (--data FILE for another text)")
    })?;
    let mut paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>, std::io::Error>>()
        .with_context(|| format!("cannot read {}", folder.display()))?;
    paths.retain(|path| path.extension().is_some_and(|end| end == ending));
    paths.sort();
    Ok(paths)
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
}
