#![no_main]

#[path = "../../tests/fuzz/plan.rs"]
mod body;
#[path = "../../tests/fuzz/execute.rs"]
mod execute;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|data: &[u8]| {
    body::run(data);
});

// Bytes of a plan mean something only together, so three times of four fields are changed rather than bytes.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let changed = if seed % 4 == 0 { None } else { body::mutate(&data[..size], seed.into()) };
    match changed {
        Some(changed) if changed.len() <= max_size => {
            data[..changed.len()].copy_from_slice(&changed);
            changed.len()
        }
        _ => fuzzer_mutate(data, size, max_size),
    }
});
