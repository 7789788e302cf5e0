#![no_main]

#[path = "../../tests/fuzz/tokenizer.rs"]
mod body;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    body::run(data);
});
