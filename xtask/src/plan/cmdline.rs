//! The kernel's command line: which arguments reach the kernel unchanged through the boot flow, and
//! how the kernel parses them.

use crate::config::board::{BoardConfig, BootFlowKind};
use crate::config::reader::ConfigFinding;

/// The maximum length on arm64 including the final zero (`COMMAND_LINE_SIZE`,
/// arch/arm64/include/uapi/asm/setup.h).
const KERNEL_TAKES: usize = 2048;

/// Reserved for the arguments of the boot files and U-Boot (about 200 bytes), and of the Raspberry
/// Pi's firmware (about 600 bytes).
const RESERVED: usize = 1024;

/// Arguments that the boot files set for each slot.
const OURS: [&str; 5] =
    ["root", "slipway.slot", "slipway.trial", "slipway.unloadable", "slipway.tryboot"];

/// Characters with a meaning in U-Boot's shell, in which the script sets the line.
const SHELL: &str = "\"'`$\\;&|";

/// The rules of `kernel.cmdline`.
pub(super) fn check_cmdline(board: &BoardConfig, out: &mut Vec<ConfigFinding>) {
    for word in &board.kernel.cmdline {
        if let Some((why, help)) = find_problem(&word.value, board.boot_flow.value) {
            let message = format!("`kernel.cmdline`: `{}` {why}", word.value.escape_debug());
            out.push(ConfigFinding::new(&word.place, message, help));
        }
    }
    let length: usize = board.kernel.cmdline.iter().map(|word| word.value.len() + 1).sum();
    if let (Some(last), true) = (board.kernel.cmdline.last(), length > KERNEL_TAKES - RESERVED) {
        let message = format!(
            "`kernel.cmdline` has {length} bytes, the maximum is {}: the kernel accepts {} in \
             total and drops the rest",
            KERNEL_TAKES - RESERVED,
            KERNEL_TAKES - 1
        );
        let help = "move settings of modules to /etc/modprobe.d of an overlay";
        out.push(ConfigFinding::new(&last.place, message, help));
    }
}

/// Why an argument would not reach the kernel as it is written, and what to do.
fn find_problem(word: &str, flow: BootFlowKind) -> Option<(String, &'static str)> {
    const ONE: &str = "write one argument: `name` or `name=value`";
    let name = word.trim_start_matches('"').split(['=', ' ']).next().unwrap_or_default();
    // The kernel treats a dash as an underscore; `--` ends its arguments.
    if word.trim().is_empty() || name == "--" {
        return Some(("is not an argument of the kernel".to_owned(), ONE));
    }
    if OURS.contains(&name) {
        let why = format!("sets {name}, which the boot files set for each slot");
        return Some((why, "leave it out"));
    }
    // The last `console=` is /dev/console: an additional serial port here would print where the
    // product disables the console.
    let ports = word.split(' ').filter_map(|part| part.strip_prefix("console="));
    if let Some(port) = ports.into_iter().find(|port| !port.starts_with("tty0")) {
        let why = format!("sets the console {port}");
        return Some((why, "set `console.device` of the board, or `console` of the product"));
    }
    if let Some(c) = word.chars().find(|c| !c.is_ascii_graphic() && *c != ' ') {
        return Some((
            format!("has the character {c:?}"),
            "only printable ASCII reaches the kernel",
        ));
    }
    match flow {
        BootFlowKind::Uboot => {
            let c = word.chars().find(|c| SHELL.contains(*c))?;
            let why = format!("has the character {c:?}, which has a meaning in U-Boot's shell");
            let help = "remove the character: `module.dyndbg=+p` needs no quotes, and options of \
             modules can be \
                        in /etc/modprobe.d of an overlay";
            Some((why, help))
        }
        BootFlowKind::Tryboot if word.matches('"').count() % 2 == 1 => {
            let why = "has a quote that is not closed: the kernel would read the rest of the line \
             as its value";
            Some((why.to_owned(), "close the quote"))
        }
        BootFlowKind::Tryboot => None,
    }
}

/// The arguments of a line as the kernel takes them apart (`next_arg`, lib/cmdline.c): name, and
/// value without the quotes around it; a quote that is not closed takes the rest. Arguments after
/// `--` are for init.
pub fn split_arguments(line: &str) -> Vec<(String, Option<String>)> {
    let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
    for c in line.chars() {
        quoted ^= c == '"';
        if !c.is_ascii_whitespace() || quoted {
            word.push(c);
        } else if !word.is_empty() {
            words.push(std::mem::take(&mut word));
        }
    }
    words.extend((!word.is_empty()).then_some(word));
    let unquoted = |text: &str| match text.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"').unwrap_or(rest).to_owned(),
        None => text.to_owned(),
    };
    let arguments = words.iter().take_while(|word| *word != "--").map(|word| {
        let whole = unquoted(word);
        match whole.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(unquoted(value))),
            None => (whole, None),
        }
    });
    arguments.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart_as_the_kernel_does() {
        let value = |text: &str| Some(text.to_owned());
        let line = "ro  root=/dev/x a=\"b c; d\" \"e=f g\" h=i\"j k\"l -- init";
        let expected = [
            ("ro", None),
            ("root", value("/dev/x")),
            ("a", value("b c; d")),
            ("e", value("f g")),
            ("h", value("i\"j k\"l")),
        ];
        assert_eq!(split_arguments(line), expected.map(|(name, value)| (name.to_owned(), value)));
        assert_eq!(split_arguments("a=\"b ro"), [("a".to_owned(), value("b ro"))]);
    }

    #[test]
    fn what_would_not_arrive_is_refused() {
        let uboot = |word: &str| find_problem(word, BootFlowKind::Uboot).map(|(why, _)| why);
        let tryboot = |word: &str| find_problem(word, BootFlowKind::Tryboot).map(|(why, _)| why);
        for word in ["ro", "console=tty0", "rootwait", "rootfstype=ext4", "a=b,c:d/e@f#g", "x=1 y"]
        {
            assert_eq!((uboot(word), tryboot(word)), (None, None), "{word}");
        }
        for word in
            ["", " ", "--", "root=/dev/sda", "slipway.slot=b", "\"root=x\"", "a=ü", "a\nb", "a\tb"]
        {
            assert!(uboot(word).is_some() && tryboot(word).is_some(), "{word}");
        }
        for word in [
            "dyndbg=\"module a +p; module b +p\"",
            "a='b'",
            "a=$b",
            "a=b;c",
            "a\\b",
            "a=`b`",
            "a|b",
            "a&b",
        ] {
            assert!(uboot(word).is_some(), "{word}");
            assert_eq!(tryboot(word), None, "{word}");
        }
        assert!(tryboot("a=\"b").is_some_and(|why| why.contains("not closed")));
    }
}
