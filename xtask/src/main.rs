//! The command line; everything that it does lives in the library.

fn main() {
    xtask::progress::say("plan", "nothing yet");
}
