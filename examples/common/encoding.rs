//! Texts as they come: in UTF-8, in UTF-16 with its mark, or in an encoding that is named or can be told from the bytes.

use anyhow::{Result, anyhow, bail, ensure};
use chardetng::{EncodingDetector, Iso2022JpDetection, Utf8Detection};
use encoding_rs::{DecoderResult, Encoding, REPLACEMENT, UTF_8, WINDOWS_1252};

/// A text, without byte order marks and with `\n` at the end of each line.
#[derive(Debug, PartialEq)]
pub struct Decoded {
    pub text: String,
    /// What the reader should know: that the encoding was guessed, and from what.
    pub remark: Option<String>,
}

const EXPECTED: &str = "expected utf-8, utf-16le, utf-16be, latin-1, windows-1252 or another encoding of the \
                        WHATWG's standard";

/// An encoding by its name in the WHATWG's standard, or as `latin-1`.
pub fn by_name(name: &str) -> Result<&'static Encoding> {
    match name.to_ascii_lowercase().as_str() {
        // The standard's Latin-1 is Windows-1252: the same letters, and quotes where the other has control characters.
        "latin-1" => Ok(WINDOWS_1252),
        // The standard takes it for the first of the two, whatever the mark says.
        "utf-16" => bail!("utf-16le or utf-16be; a text with a byte order mark needs neither"),
        _ => Encoding::for_label(name.as_bytes())
            .filter(|&encoding| encoding != REPLACEMENT)
            .ok_or_else(|| anyhow!(EXPECTED)),
    }
}

/// The text of a file's bytes, in the encoding that is given, in that of its byte order mark, in UTF-8, or in Windows-1252
/// where all of it looks like that.
pub fn decode(bytes: &[u8], given: Option<&'static Encoding>) -> Result<Decoded> {
    let utf_32 = [[0xff, 0xfe, 0, 0], [0, 0, 0xfe, 0xff]];
    ensure!(!utf_32.iter().any(|mark| bytes.starts_with(mark)), "UTF-32, which is not read");
    let mark = Encoding::for_bom(bytes).map(|(encoding, _)| encoding);
    if let (Some(given), Some(mark)) = (given, mark)
        && given != mark
    {
        bail!("it begins with the mark of {}, but --encoding says {}", mark.name(), given.name());
    }
    let encoding = given.or(mark).unwrap_or(UTF_8);
    let (text, remark) = match strictly(bytes, encoding) {
        Ok(text) => (text, None),
        Err(odd) if given.or(mark).is_none() => guess(bytes, odd)?,
        Err(odd) => bail!("{}", oddity(bytes, odd, encoding)),
    };
    refuse_zeros(text.as_bytes())?;
    Ok(Decoded { text: tidy(&text), remark })
}

/// That the byte at `place` is none of the encoding's.
fn oddity(bytes: &[u8], place: usize, encoding: &'static Encoding) -> String {
    let (byte, line, name) = (bytes[place], line_of(&bytes[..place]), encoding.name());
    format!("byte {place} ({byte:#04x}, in line {line}) is not {name}")
}

fn refuse_zeros(bytes: &[u8]) -> Result<()> {
    let Some(place) = bytes.iter().position(|&byte| byte == 0) else { return Ok(()) };
    let line = line_of(&bytes[..place]);
    bail!(
        "a zero in line {line}: not a text, or UTF-16 without its mark (--encoding utf-16le or utf-16be)"
    )
}

fn line_of(before: &[u8]) -> usize {
    1 + before.iter().filter(|&&byte| byte == b'\n').count()
}

/// The text, or the place of the first byte that is none of the encoding's.
fn strictly(bytes: &[u8], encoding: &'static Encoding) -> Result<String, usize> {
    let mut decoder = encoding.new_decoder_without_bom_handling();
    let most = decoder.max_utf8_buffer_length_without_replacement(bytes.len());
    let mut text = String::with_capacity(most.expect("a file is smaller than the address space"));
    match decoder.decode_to_string_without_replacement(bytes, &mut text, true) {
        (DecoderResult::InputEmpty, _) => Ok(text),
        (DecoderResult::Malformed(odd, after), read) => {
            Err(read - usize::from(odd) - usize::from(after))
        }
        (DecoderResult::OutputFull, _) => unreachable!("there is room for the longest text"),
    }
}

/// A text whose byte `odd` is not UTF-8, read as Windows-1252, and a remark that it was. Refuses what does not look like it.
fn guess(bytes: &[u8], odd: usize) -> Result<(String, Option<String>)> {
    refuse_zeros(bytes)?;
    let why = oddity(bytes, odd, UTF_8);
    let instead = "--encoding NAME says what it is";
    // A text with characters of several bytes is in UTF-8, and damaged.
    let sound = bytes.utf8_chunks().any(|chunk| !chunk.valid().is_ascii());
    ensure!(!sound, "{why}, other characters are: damaged, or in another encoding? ({instead})");
    let cut = str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none());
    ensure!(!cut, "{why}: is its last character cut? ({instead})");
    let mut detector = EncodingDetector::new(Iso2022JpDetection::Deny);
    detector.feed(bytes, true);
    let guessed = |country| detector.guess(country, Utf8Detection::Deny);
    let control = |c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\x0c');
    let text = strictly(bytes, WINDOWS_1252).ok().filter(|text| !text.contains(control));
    let Some(text) = text else { bail!("{why}: not a text? ({instead})") };
    // A few letters say little: what is expected is a country's that has this encoding.
    let here = guessed(Some(b"us"));
    ensure!(here == WINDOWS_1252, "{why}: perhaps {} ({instead})", here.name());
    let doubt = match guessed(None) {
        same if same == WINDOWS_1252 => String::new(),
        other => format!(", perhaps it is {}", other.name()),
    };
    Ok((text, Some(format!("{why}: read as windows-1252{doubt} ({instead})"))))
}

/// Without byte order marks, which files that were joined have in their middle; lines end in `\n`.
fn tidy(text: &str) -> String {
    text.replace('\u{feff}', "").replace("\r\n", "\n").replace('\r', "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Café – “naïve”\nœuvre\n";

    fn read(bytes: &[u8], name: Option<&str>) -> Result<Decoded, String> {
        decode(bytes, name.map(|name| by_name(name).unwrap())).map_err(|error| error.to_string())
    }

    fn is(bytes: &[u8], name: Option<&str>, text: &str) {
        assert_eq!(read(bytes, name), Ok(Decoded { text: text.to_owned(), remark: None }));
    }

    fn refused(bytes: &[u8], name: Option<&str>, why: &str) {
        let error = read(bytes, name).unwrap_err();
        assert!(error.contains(why), "{error}");
    }

    fn utf_16(text: &str, to_bytes: fn(u16) -> [u8; 2]) -> Vec<u8> {
        text.encode_utf16().flat_map(to_bytes).collect()
    }

    #[test]
    fn marks_are_obeyed_and_are_no_part_of_the_text() {
        let marked = format!("\u{feff}{TEXT}");
        is(TEXT.as_bytes(), None, TEXT);
        is(marked.as_bytes(), None, TEXT);
        is(marked.as_bytes(), Some("UTF-8"), TEXT);
        is([&marked, &marked[..]].concat().as_bytes(), None, &TEXT.repeat(2));
        is(b"", None, "");
        for (to_bytes, name) in
            [(u16::to_le_bytes as fn(u16) -> _, "utf-16le"), (u16::to_be_bytes, "utf-16be")]
        {
            is(&utf_16(&marked, to_bytes), None, TEXT);
            is(&utf_16(&marked, to_bytes), Some(name), TEXT);
            is(&utf_16(TEXT, to_bytes), Some(name), TEXT);
        }
        refused(&utf_16(&marked, u16::to_le_bytes), Some("utf-16be"), "the mark of UTF-16LE");
        refused(marked.as_bytes(), Some("latin-1"), "the mark of UTF-8");
        refused(b"\xff\xfe\0\0a\0\0\0", None, "UTF-32");
        refused(b"\0\0\xfe\xff\0\0\0a", None, "UTF-32");
    }

    #[test]
    fn lines_end_in_a_newline() {
        is(b"a\r\nb\rc\nd\r", None, "a\nb\nc\nd\n");
        is(&utf_16("\u{feff}a\r\n\rb", u16::to_le_bytes), None, "a\n\nb");
    }

    #[test]
    fn other_encodings_are_named_or_told_with_the_place_of_the_first_odd_byte() {
        is(b"caf\xe9 \x80", Some("latin-1"), "café €");
        is(b"caf\xe9 \x80", Some("iso-8859-1"), "café €");
        is(b"\xcf\xf0\xe8\xe2\xe5\xf2", Some("windows-1251"), "Привет");
        let western = b"A l\x92\xe9t\xe9, le caf\xe9 est\r\nd\xe9j\xe0 ferm\xe9.\n".repeat(3);
        let Decoded { text, remark } = read(&western, None).unwrap();
        assert_eq!(text, "A l’été, le café est\ndéjà fermé.\n".repeat(3));
        let remark = remark.unwrap();
        assert!(remark.starts_with("byte 3 (0x92, in line 1) is not UTF-8"), "{remark}");
        assert!(remark.contains("windows-1252"), "{remark}");
        // One such byte in a long text.
        let one = ["plain words\n".repeat(99).as_bytes(), b"fianc\xe9 and more\n"].concat();
        assert!(
            read(&one, None).unwrap().remark.unwrap().contains("byte 1193 (0xe9, in line 100)")
        );
        let (polish, ..) = encoding_rs::WINDOWS_1250.encode("Zażółć gęślą jaźń, wszystko");
        assert!(
            read(&polish, None).unwrap().remark.unwrap().contains("perhaps it is windows-1250")
        );
        for name in ["utf-17", "utf-16", "replacement", ""] {
            assert!(by_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_no_text_of_its_encoding_is_refused() {
        // A damaged byte, and a character that is cut, at the end or within.
        refused(b"caf\xc3\xa9 \xff!", None, "byte 6 (0xff, in line 1) is not UTF-8");
        refused(b"a caf\xc3", None, "is its last character cut?");
        refused(b"caf\xc3\xa9 caf\xc3", None, "byte 9 (0xc3, in line 1) is not UTF-8");
        refused("☃\n☃".as_bytes().split_last().unwrap().1, None, "line 2");
        refused(b"caf\xe9", Some("utf-8"), "byte 3 (0xe9, in line 1) is not UTF-8");
        let utf_16 = utf_16("\u{feff}abc", u16::to_le_bytes);
        refused(&utf_16[..7], None, "is not UTF-16LE");
        refused(b"\xff\xfe\x00\xd8a\0", None, "byte 2 (0x00, in line 1) is not UTF-16LE");
        // UTF-16 without its mark, and other things with zeros.
        refused(&utf_16[2..], None, "a zero in line 1");
        refused(
            &utf_16[..].iter().chain(b"\xe9\0").copied().collect::<Vec<_>>()[2..],
            None,
            "UTF-16 without its mark",
        );
        refused(b"one\ntwo\0", Some("latin-1"), "a zero in line 2");
        refused(b"\x7fELF\x02\x01\x01\xf0\n", None, "not a text?");
        refused(&[0x8b, 0x1f, 0xff].repeat(9), None, "not a text?");
        // Other alphabets are not guessed, for a wrong one goes unseen.
        let (russian, ..) =
            encoding_rs::KOI8_R.encode("Все счастливые семьи похожи друг на друга.");
        refused(&russian, None, "perhaps ");
        let (japanese, ..) = encoding_rs::SHIFT_JIS.encode("吾輩は猫である。名前はまだ無い。");
        refused(&japanese, None, "byte 0");
    }
}
