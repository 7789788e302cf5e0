#![no_main]

#[path = "../../tests/fuzz/gguf.rs"]
mod body;
#[path = "../../tests/fuzz/execute.rs"]
mod execute;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    body::run(data);
});
