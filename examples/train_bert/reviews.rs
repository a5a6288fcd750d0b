//! Two files of texts as sequences of tokens with a class, a tenth of them held out, and the batches of a step.

use super::common::epochs::shuffled;
use super::tokenizer::{FIRST, LAST, PAD, Tokenizer};
use anyhow::{Result, ensure};
use fused_dropout::transformer::IGNORED;

/// What random numbers are drawn for. (`Epochs` has 0.)
const SPLIT: u64 = 1;

/// A text as tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Review {
    pub tokens: Vec<u32>,
    /// 0: negative, 1: positive.
    pub class: i32,
}

/// All texts.
pub struct Reviews {
    pub tokenizer: Tokenizer,
    pub train: Vec<Review>,
    pub held_out: Vec<Review>,
}

/// Words that occur less often than this in the training texts are unknown.
const LEAST_COUNT: usize = 2;

impl Reviews {
    /// Of the lines of two files: a tenth of each is held out, by the seed. The words are those of the rest.
    pub fn new(negative: &str, positive: &str, length: usize, seed: u64) -> Result<Self> {
        let (mut train, mut held_out) = (Vec::new(), Vec::new());
        ensure!(negative != positive, "--negative and --positive: the same text, twice");
        for (class, text) in [(0, negative), (1, positive)] {
            let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
            let names = ["--negative", "--positive"];
            let name = names[class as usize];
            ensure!(
                lines.len() >= 10,
                "{name}: expected at least 10 texts, a line each, got {}",
                lines.len()
            );
            let order = shuffled(lines.len(), seed, class as u64, SPLIT);
            let (held, rest) = order.split_at(lines.len() / 10);
            held_out.extend(held.iter().map(|&line| (lines[line], class)));
            train.extend(rest.iter().map(|&line| (lines[line], class)));
        }
        let tokenizer = Tokenizer::new(train.iter().map(|(line, _)| *line), LEAST_COUNT);
        let encode = |texts: Vec<(&str, i32)>| {
            let review = |(line, class)| Review { tokens: tokenizer.encode(line, length), class };
            texts.into_iter().map(review).collect()
        };
        let (train, held_out) = (encode(train), encode(held_out));
        Ok(Self { tokenizer, train, held_out })
    }
}

/// Sequences of one length, padded at their ends.
pub struct Sequences {
    /// `[batch, length]`.
    pub ids: Vec<u32>,
    /// Whether each is a token, `[batch, length]`.
    pub tokens: Vec<bool>,
    /// Of each sequence, `[batch]`.
    pub classes: Vec<i32>,
}

impl Sequences {
    /// Of at most `batch` texts. What is missing to `batch` are empty texts without a class.
    pub fn new<'a>(texts: impl Iterator<Item = &'a Review>, batch: usize, length: usize) -> Self {
        let mut sequences = Self { ids: Vec::new(), tokens: Vec::new(), classes: Vec::new() };
        texts.for_each(|text| sequences.push(text, length));
        let empty = Review { tokens: vec![FIRST, LAST], class: IGNORED };
        while sequences.classes.len() < batch {
            sequences.push(&empty, length);
        }
        sequences
    }

    fn push(&mut self, text: &Review, length: usize) {
        let pad = length - text.tokens.len();
        self.ids.extend(text.tokens.iter().copied().chain(std::iter::repeat_n(PAD, pad)));
        self.tokens.extend((0..length).map(|position| position < text.tokens.len()));
        self.classes.push(text.class);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_of_either_file_is_held_out_and_the_words_are_those_of_the_rest() {
        let lines =
            |word: &str| (0..20).map(|i| format!("{word} {word} {i}\n")).collect::<String>();
        let reviews = Reviews::new(&lines("bad"), &lines("good"), 8, 1).unwrap();
        for class in [0, 1] {
            let count = |texts: &[Review]| texts.iter().filter(|text| text.class == class).count();
            assert_eq!((count(&reviews.train), count(&reviews.held_out)), (18, 2));
        }
        // A number occurs once in each file; of one that is held out in either, one is left.
        let known = reviews.tokenizer.vocabulary.len();
        assert!(known < 5 + 2 + 20, "{known}");
        assert!(Reviews::new("", &lines("good"), 8, 1).is_err());
        let same = Reviews::new(&lines("bad"), &lines("good"), 8, 1).unwrap();
        assert_eq!(same.train, reviews.train);
    }

    #[test]
    fn sequences_are_padded_and_missing_ones_have_no_class() {
        let text = Review { tokens: vec![FIRST, 9, LAST], class: 1 };
        let Sequences { ids, tokens, classes } = Sequences::new([text].iter(), 2, 4);
        assert_eq!(ids, [FIRST, 9, LAST, PAD, FIRST, LAST, PAD, PAD]);
        assert_eq!(tokens, [true, true, true, false, true, true, false, false]);
        assert_eq!(classes, [1, IGNORED]);
    }
}
