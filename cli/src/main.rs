//! The program `takuma`: hands the arguments to the library and ends with its exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    takuma_cli::main_with(std::env::args_os()).into()
}
