//! The two trainers as their users run them: interrupted, continued, started anew, piped.

#![cfg(all(target_os = "linux", feature = "transformer"))]

use serde_json::Value;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;

/// A folder of a test's own, empty.
fn folder(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("runs").join(name);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

/// The programs, built as this test was: where `cargo test` has built them already, that is done at once.
static PROGRAMS: LazyLock<PathBuf> = LazyLock::new(|| {
    let mut build = Command::new(env!("CARGO"));
    build.current_dir(env!("CARGO_MANIFEST_DIR")).args(["build", "--quiet", "--features"]);
    let cuda = if cfg!(feature = "cuda") { ",cuda" } else { "" };
    let emulator = if cfg!(feature = "emulator") { ",emulator" } else { "" };
    build.arg(format!("transformer{cuda}{emulator}"));
    build.args(["--example", "train_gpt", "--example", "train_bert"]);
    let here = std::env::current_exe().unwrap();
    let profile = here.parent().and_then(Path::parent).unwrap();
    if profile.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().unwrap().success());
    profile.join("examples")
});

fn program(name: &str, arguments: &[&str], out: &Path) -> Command {
    let mut command = Command::new(PROGRAMS.join(name));
    // In one word: a folder's name may begin with a dash.
    let mut folder = OsString::from("--out=");
    folder.push(out);
    command.args(arguments).arg(folder).env("RAYON_NUM_THREADS", "1");
    command
}

/// Six steps on a text, looked at after every third.
fn gpt(data: &Path, out: &Path) -> Command {
    let options = ["--steps", "6", "--eval-interval", "3", "--sample", "9", "--dropout", "0.2"];
    let mut command = program("train_gpt", &options, out);
    command.arg("--data").arg(data);
    command
}

const TEXT: &str = "The cat sat on the mat; the dog saw it — naïve. ";

fn some_text(folder: &Path) -> PathBuf {
    let path = folder.join("text.txt");
    fs::write(&path, TEXT.repeat(30)).unwrap();
    path
}

/// Two epochs of three steps for either model.
fn bert(folder: &Path, out: &Path) -> Command {
    let mut command = program("train_bert", &["--masked-epochs", "2", "--epochs", "2"], out);
    for (option, word) in [("--positive", "good"), ("--negative", "bad")] {
        let path = folder.join(word);
        let lines = |i| format!("film {i} is {word}\n");
        fs::write(&path, (0..50).map(lines).collect::<String>()).unwrap();
        command.arg(option).arg(path);
    }
    command
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn finishes(mut command: Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{status}\n{}{}", text_of(&stdout), text_of(&stderr));
    text_of(&stdout)
}

#[track_caller]
fn is_refused(mut command: Command, why: &[&str]) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (stdout, stderr) = (text_of(&stdout), text_of(&stderr));
    assert!(matches!(status.code(), Some(1 | 2)), "{status}\n{stdout}{stderr}");
    assert!(why.iter().all(|why| stderr.contains(why)), "{stderr}");
}

/// A program that is killed where this is dropped, whatever becomes of the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a program and reads its standard output to the first line that is looked for.
fn until(mut command: Command, found: impl Fn(&str) -> bool) -> (Running, impl BufRead) {
    let mut child = Running(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut lines = BufReader::new(child.0.stdout.take().unwrap());
    let mut line = String::new();
    while !found(&line) {
        line.clear();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0, "it ended before");
    }
    (child, lines)
}

/// Sends Ctrl-C, twice at once as some programs do, at a line of the output; the command that is printed then.
fn stopped(command: Command, at: impl Fn(&str) -> bool) -> Command {
    let (mut child, lines) = until(command, at);
    let kill = Command::new("sh")
        .arg("-c")
        .arg(format!("kill -INT {0}; kill -INT {0}", child.0.id()))
        .status();
    assert!(kill.unwrap().success());
    let lines: Vec<Vec<u8>> = lines.split(b'\n').map(Result::unwrap).collect();
    assert_eq!(child.0.wait().unwrap().code(), Some(130));
    let printed = lines.iter().find_map(|line| line.strip_prefix(b"stopped; to continue: "));
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(OsStr::from_bytes(printed.expect("a command")));
    shell.env("RAYON_NUM_THREADS", "1");
    shell
}

/// A row of the table of evaluations.
fn is_row(line: &str) -> bool {
    line.split_whitespace().next().is_some_and(|first| first.parse::<u64>().is_ok())
}

/// Of a run of several.
fn is_row_of(line: &str, run: &str) -> bool {
    line.trim_start().starts_with(run) && line.split_whitespace().count() == 6
}

/// What a run has left, but for times and places.
fn results(out: &Path) -> (Value, Vec<u8>) {
    fn strip(value: &mut Value) {
        let timed = ["ms_per_step", "tokens_per_second", "data", "positive", "negative"];
        match value {
            Value::Object(fields) => {
                fields.retain(|name, _| !timed.contains(&name.as_str()));
                fields.values_mut().for_each(strip);
            }
            Value::Array(values) => values.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut metrics = serde_json::from_slice(&fs::read(out.join("metrics.json")).unwrap()).unwrap();
    strip(&mut metrics);
    (metrics, fs::read(out.join("model.safetensors")).unwrap())
}

fn checkpoint(out: &Path) -> Vec<u8> {
    fs::read(out.join("checkpoint.safetensors")).unwrap()
}

#[test]
fn a_run_that_was_stopped_goes_on_by_the_command_that_it_prints() {
    let folder = folder("stopped");
    let (text, whole) = (some_text(&folder), folder.join("whole"));
    finishes(gpt(&text, &whole));
    // A path that a shell would take apart, and one that is no text.
    for name in [&b"-it's a \"folder\" $HOME"[..], b"\xff\xfe"] {
        let out = folder.join(OsStr::from_bytes(name));
        finishes(stopped(gpt(&text, &out), is_row));
        assert_eq!(results(&out), results(&whole));
    }
    // In the folder whose name begins with a dash, as its user types it.
    let mut there = gpt(&text, Path::new("-out"));
    there.current_dir(&folder);
    let mut on = stopped(there, is_row);
    on.current_dir(&folder);
    finishes(on);
    assert_eq!(results(&folder.join("-out")), results(&whole));
}

/// Before the schedule's step the losses are those with dropout, or those without, and from there on others. A run that was
/// stopped goes on with its schedule.
#[test]
fn dropout_until_a_step_and_from_one() {
    let folder = folder("schedule");
    let text = some_text(&folder);
    let new = |option: &str, out: &str| {
        let mut command = gpt(&text, &folder.join(out));
        command.arg(option);
        command
    };
    let losses =
        |out: &str| results(&folder.join(out)).0["step_losses"].as_array().unwrap().clone();
    finishes(new("--dropout=0.2", "always"));
    finishes(new("--dropout=0", "never"));
    for (option, before) in [("--dropout-until=4", "always"), ("--dropout-from=4", "never")] {
        finishes(new(option, option));
        let (before, scheduled) = (losses(before), losses(option));
        assert_eq!(scheduled[..4], before[..4], "{option}");
        assert_ne!(scheduled[4], before[4], "{option}");
        let out = option.replace("--", "stopped-");
        finishes(stopped(new(option, &out), is_row));
        assert_eq!(results(&folder.join(out)), results(&folder.join(option)));
    }
    let mut other = program("train_gpt", &["--resume", "--dropout-from=5"], &folder.join("always"));
    is_refused(other, &["cannot resume", "dropout_from"]);
    other = new("--dropout-until=4", "both");
    other.arg("--dropout-from=5");
    is_refused(other, &["--dropout-until", "--dropout-from"]);
    other = new("--dropout-until=4", "nothing");
    other.arg("--dropout=0");
    is_refused(other, &["a --dropout above 0", "--dropout-until"]);
}

#[test]
fn a_bert_goes_on_from_either_of_its_stages() {
    let folder = folder("bert");
    let whole = folder.join("whole");
    finishes(bert(&folder, &whole));
    for (stage, title) in ["Masked language model:", "Classifier:"].iter().enumerate() {
        let out = folder.join(stage.to_string());
        finishes(stopped(bert(&folder, &out), |line| line.starts_with(title)));
        assert_eq!(results(&out), results(&whole), "stopped in {title}");
    }
}

/// Its steps alternate, it goes on as it was, and what it leaves does not come in the way of another run.
#[test]
fn a_comparison_takes_turns_goes_on_and_gives_way() {
    let folder = folder("comparison");
    let new =
        |out: &Path| program("train_gpt", &["--steps=2", "--eval-interval=1", "--sample=0"], out);
    let (whole, out) = (folder.join("whole"), folder.join("out"));
    let printed = finishes(new(&whole));
    let rows = printed.lines().filter(|line| is_row_of(line, "dropout"));
    let steps: Vec<u64> =
        rows.map(|row| row.split_whitespace().nth(2).unwrap().parse().unwrap()).collect();
    assert_eq!(steps, [0, 0, 1, 1, 2, 2]);
    finishes(stopped(new(&out), |line| is_row_of(line, "dropout 0.2")));
    for part in ["", "without-dropout"] {
        let weights = |out: &Path| fs::read(out.join(part).join("model.safetensors")).unwrap();
        assert_eq!(weights(&out), weights(&whole));
    }
    assert_eq!(results(&out), results(&whole));

    let text = some_text(&folder);
    let mut another = gpt(&text, &out);
    another.arg("--overwrite");
    finishes(stopped(another, is_row));
    let alone = folder.join("alone");
    finishes(gpt(&text, &alone));
    assert_eq!(results(&out), results(&alone));
}

#[test]
fn an_earlier_checkpoint_stays_until_another_takes_its_place() {
    let folder = folder("earlier");
    let (text, out) = (some_text(&folder), folder.join("out"));
    finishes(gpt(&text, &out));
    let earlier = checkpoint(&out);
    is_refused(gpt(&text, &out), &["--resume", "--overwrite", "--out"]);
    is_refused(bert(&folder, &out), &["--resume", "--overwrite", "--out"]);
    assert_eq!(checkpoint(&out), earlier);
    // The first evaluation of this one is on a long text: nothing is saved yet when its title is there.
    let begun = program("train_gpt", &["--overwrite", "--dropout=0.1", "--steps=1"], &out);
    drop(until(begun, |line| line.starts_with("Dropout")));
    assert_eq!(checkpoint(&out), earlier);
    finishes(program("train_gpt", &["--resume"], &out));
    assert_eq!(checkpoint(&out), earlier);
    let mut other = gpt(&text, &out);
    other.args(["--seed=2", "--overwrite"]);
    finishes(other);
    assert_ne!(checkpoint(&out), earlier);
}

#[test]
fn damaged_notes_and_a_strange_models_folder_are_refused() {
    let folder = folder("damaged");
    let (text, out) = (some_text(&folder), folder.join("out"));
    finishes(gpt(&text, &out));
    let file = checkpoint(&out);
    let damages =
        [("step", "3", "9"), ("step", "6", "9"), ("eval_interval", "3", "0"), ("steps", "6", "0")];
    let header = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    let (head, tensors) = file.split_at(header);
    for (name, from, to) in damages {
        // JSON in a string in a string.
        let [from, to] = [from, to].map(|value| format!(r#"\\\"{name}\\\":{value}"#));
        let notes = String::from_utf8_lossy(&head[8..]);
        assert!(notes.contains(&from), "{from}");
        let notes = notes.replace(&from, &to);
        let damaged = [&head[..8], notes.as_bytes(), tensors].concat();
        fs::write(out.join("checkpoint.safetensors"), damaged).unwrap();
        is_refused(program("train_gpt", &["--resume"], &out), &["cannot resume", "checkpoint"]);
    }
    fs::remove_file(out.join("checkpoint.safetensors")).unwrap();
    let model = fs::read(out.join("model.safetensors")).unwrap();
    is_refused(gpt(&text, &out), &["has a model already", "--overwrite"]);
    assert_eq!(fs::read(out.join("model.safetensors")).unwrap(), model);
}

#[test]
fn a_folder_is_one_runs_until_its_process_ends() {
    let folder = folder("lock");
    let (text, out) = (some_text(&folder), folder.join("out"));
    let mut first = gpt(&text, &out);
    first.arg("--steps=1000000");
    let first = until(first, |line| line.trim_start().starts_with("3 "));
    for option in ["--overwrite", "--resume"] {
        let mut second = gpt(&text, &out);
        second.arg(option).arg("--steps=1000000");
        is_refused(second, &["another run is writing to"]);
    }
    drop(first);
    let mut second = gpt(&text, &out);
    second.arg("--overwrite");
    finishes(second);
}

#[test]
fn a_text_may_move_and_may_not_change() {
    let folder = folder("moved");
    let (text, out, there) = (some_text(&folder), folder.join("out"), folder.join("there"));
    finishes(gpt(&text, &out));
    fs::rename(&text, &there).unwrap();
    let resumed = |data: Option<&Path>| {
        let mut command = program("train_gpt", &["--resume"], &out);
        data.map(|path| command.arg("--data").arg(path));
        command
    };
    is_refused(resumed(None), &["cannot read", "text.txt"]);
    finishes(resumed(Some(&there)));
    fs::write(&there, TEXT.repeat(31)).unwrap();
    is_refused(resumed(Some(&there)), &["the text has changed", "--data"]);
}

#[test]
fn texts_come_through_pipes_in_several_encodings_from_any_path() {
    let folder = folder("texts");
    let (path, whole) = (some_text(&folder), folder.join("whole"));
    finishes(gpt(&path, &whole));
    let unnamed = fs::File::open(&path).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    fs::remove_file(path).unwrap();

    let odd = folder.join(OsStr::from_bytes(b"\xff.txt"));
    let utf_16 = format!("\u{feff}{text}").encode_utf16().flat_map(u16::to_be_bytes).collect();
    let latin = |c: char| if c == '—' { 0x97 } else { u8::try_from(c).unwrap() };
    let latin: Vec<u8> = text.chars().map(latin).collect();
    let ways: [(&str, Vec<u8>); 3] =
        [("marked", format!("\u{feff}{text}").into()), ("utf-16", utf_16), ("latin", latin)];
    for (way, bytes) in ways {
        fs::write(&odd, bytes).unwrap();
        let out = folder.join(way);
        let Output { status, stderr, .. } = gpt(&odd, &out).output().unwrap();
        assert!(status.success(), "{}", text_of(&stderr));
        assert_eq!(text_of(&stderr).contains("read as windows-1252"), way == "latin");
        assert_eq!(results(&out).1, results(&whole).1, "{way}");
    }
    fs::write(&odd, &text.as_bytes()[..text.find('—').unwrap() + 1]).unwrap();
    is_refused(gpt(&odd, &folder.join("cut")), &["byte 39", "line 1", "--encoding"]);
    assert!(!folder.join("cut").exists());

    // A copy is kept of what cannot be read again: a file without a name, as here-documents are, and a pipe.
    let out = folder.join("here");
    let mut here = gpt(Path::new("/dev/stdin"), &out);
    here.stdin(unnamed);
    finishes(stopped(here, is_row));
    assert_eq!(results(&out), results(&whole));
    let out = folder.join("piped");
    let mut piped = gpt(Path::new("/dev/stdin"), &out);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let writing = std::thread::spawn(move || writer.write_all(text.as_bytes()).unwrap());
    piped.stdin(reader);
    finishes(stopped(piped, is_row));
    writing.join().unwrap();
    assert_eq!(results(&out), results(&whole));
}

#[test]
fn a_reader_that_has_seen_enough_ends_no_training() {
    let folder = folder("closed");
    let text = some_text(&folder);
    let programs: [(&str, Command); 2] =
        [("gpt", gpt(&text, &folder.join("gpt"))), ("bert", bert(&folder, &folder.join("bert")))];
    for (name, command) in programs {
        let (mut child, lines) = until(command, |line| line.contains("layers"));
        drop(lines);
        assert!(child.0.wait().unwrap().success(), "{name}");
        for file in ["metrics.json", "model.safetensors", "checkpoint.safetensors"] {
            assert!(folder.join(name).join(file).exists(), "{name}: {file}");
        }
    }
    let Ok(full) = fs::File::options().write(true).open("/dev/full") else { return };
    let Output { status, stderr, .. } =
        gpt(&text, &folder.join("full")).stdout(full).output().unwrap();
    assert!(status.success());
    assert_eq!(text_of(&stderr).matches("cannot write to the standard output").count(), 1);
}

#[test]
fn options_are_refused_under_their_names_before_anything_is_written() {
    let folder = folder("options");
    let (text, out) = (some_text(&folder), folder.join("out"));
    let gpt = |option: &str| {
        let mut command = program("train_gpt", &[option], &out);
        command.arg("--data").arg(&text);
        command
    };
    let p = ["1.5", "-0.1", "NaN", "0.000005", "0.999999", "half"];
    let bert = |options: &[&str]| {
        let mut command = bert(&folder, &out);
        command.args(options);
        command
    };
    for p in p {
        is_refused(gpt(&format!("--dropout={p}")), &["--dropout", p]);
        for option in
            ["--dropout", "--hidden-dropout", "--attention-dropout", "--classifier-dropout"]
        {
            is_refused(bert(&[&format!("{option}={p}")]), &[option, p]);
        }
    }
    is_refused(gpt("--steps=0"), &["--steps"]);
    if !cfg!(feature = "cuda") {
        is_refused(gpt("--device=cuda"), &["--device cuda"]);
        is_refused(bert(&["--device=cuda"]), &["--device cuda"]);
    }
    is_refused(gpt(&format!("--steps={}", u64::MAX)), &["--steps"]);
    is_refused(gpt("--eval-interval=0"), &["--eval-interval"]);
    is_refused(gpt("--encoding=utf-17"), &["--encoding", "utf-8"]);
    is_refused(bert(&[&format!("--epochs={}", u64::MAX)]), &["--epochs"]);
    // One text for both classes, by its path, by a link and by a copy.
    let (link, copy) = (folder.join("link"), folder.join("copy"));
    std::os::unix::fs::symlink(folder.join("good"), &link).unwrap();
    fs::copy(folder.join("good"), &copy).unwrap();
    for negative in [folder.join("good"), link, copy] {
        let mut same = program("train_bert", &[], &out);
        same.arg("--positive").arg(folder.join("good")).arg("--negative").arg(negative);
        is_refused(same, &["--positive", "--negative", "same"]);
    }
    assert!(!out.exists());
}

/// Without an epoch of its own a model has no steps, and every number is one.
#[test]
fn a_bert_without_a_first_stage_leaves_only_numbers() {
    let folder = folder("stage");
    let out = folder.join("out");
    let mut command = bert(&folder, &out);
    command.args(["--masked-epochs=0", "--epochs=0"]);
    let printed = finishes(command);
    assert!(!printed.contains("NaN") && !printed.contains("inf"), "{printed}");
    fn check(value: &Value) {
        match value {
            Value::Null => panic!("a null"),
            Value::Object(fields) => fields
                .iter()
                .filter(|(name, _)| *name != "encoding")
                .for_each(|(_, value)| check(value)),
            Value::Array(values) => values.iter().for_each(check),
            _ => {}
        }
    }
    check(&results(&out).0);
}
