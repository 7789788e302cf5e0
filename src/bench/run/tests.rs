use super::*;

/// A run of `pp16` and `tg8` at such speeds.
pub fn run(speeds: [f64; 2]) -> Run {
    let result = |(work, speed)| {
        let test = Test { work, depth: 0, sequences: 1 };
        let mut m = Measurement::new(1_000_000);
        m.add(&[(1e15 / speed) as u64]);
        TestResult { median_ts: speed, ..TestResult::new(&test, 2, &m, Some(1e10)) }
    };
    let works = [Work::Prompt(16), Work::Generate { tokens: 8, logits: true }];
    Run {
        format: FORMAT,
        time: "2026-01-02T03:04:05Z".parse().unwrap(),
        hardware: Hardware {
            cpu: "a processor".into(),
            cores: 2,
            memory_bytes: Some(16 << 30),
            isa: "avx512".into(),
            gpu: None,
        },
        software: Software { sinter: "0.1.0".into(), os: "linux 6.1".into(), driver: None, compiler: None },
        model: ModelId { name: "llama 13M Q4_K".into(), bytes: 8, parameters: 13, identity: "ab-cd".into() },
        options: Settings {
            target: "cpu".into(),
            exact: false,
            type_k: "f16".into(),
            type_v: "f16".into(),
            chunk: 512,
            context: 16,
            fuse: true,
            passes: None,
            fuel: None,
            denied: vec![],
            graph: true,
            warm_up: true,
        },
        tests: works.into_iter().zip(speeds).map(result).collect(),
    }
}

fn text() -> String {
    serde_json::to_string_pretty(&run([100.0, 50.0])).unwrap()
}

#[test]
fn what_is_written_is_read() {
    assert_eq!(Run::parse(&text(), "it").unwrap(), run([100.0, 50.0]));
}

#[test]
fn a_file_that_is_cut_off_anywhere_is_one_error() {
    let text = text();
    for end in (0..text.len()).filter(|end| text.is_char_boundary(*end)) {
        let error = Run::parse(&text[..end], "it").unwrap_err().to_string();
        assert!(error.starts_with("it is no run that sinter bench kept: "), "{end}: {error}");
    }
}

#[test]
fn what_no_run_has_is_named() {
    for (from, to, says) in [
        ("\"format\": 1", "\"format\": 2", "it is of format 2, and this sinter reads format 1"),
        ("\"format\": 1", "\"format\": \"1\"", "invalid type: string \"1\""),
        ("\"format\": 1,", "", "missing field `format`"),
        ("\"median_ts\": 100.0", "\"median_ts\": NaN", "expected"),
        ("\"median_ts\": 100.0", "\"median_ts\": null", "invalid type: null"),
        ("\"median_ts\": 100.0", "\"median_ts\": 1e999", "number out of range"),
        ("\"median_ts\": 100.0", "\"median_ts\": 0", "\"pp16\": median_ts is 0, which is no speed"),
        ("\"median_ts\": 100.0", "\"median_ts\": -3", "median_ts is -3, which is no speed"),
        ("\"median_ts\": 100.0", "\"median_ts\": 1e-300", "which is no speed"),
        ("\"stddev_ts\": 0.0", "\"stddev_ts\": -1.0", "stddev_ts is -1, which is no deviation"),
        ("\"p95_ns\": 10000000000000", "\"p95_ns\": 1", "are no percentiles"),
        ("\"read_bandwidth_gbs\": 10.0", "\"read_bandwidth_gbs\": 0", "read_bandwidth_gbs is 0"),
        ("\"n_threads\": 2", "\"n_threads\": 0", "no threads"),
        ("\"repetitions\": 1", "\"repetitions\": 0", "no repetitions"),
        ("\"n_sequences\": 1", "\"n_sequences\": 0", "describe no test"),
        ("\"n_prompt\": 16", "\"n_prompt\": 17", "describe no test"),
        ("\"n_gen\": 8", "\"n_gen\": 0", "describe no test"),
        ("\"time\": \"2026", "\"time\": \"tomorrow", "failed to parse"),
        ("\"cores\": 2", "\"cores\": -2", "invalid value"),
    ] {
        let text = text();
        assert!(text.contains(from), "{from}: {text}");
        let error = Run::parse(&text.replacen(from, to, 1), "it").unwrap_err().to_string();
        assert!(error.contains(says) && !error.contains('\n'), "{to}: {error}");
    }
    let mut twice = run([1.0, 2.0]);
    twice.tests.push(twice.tests[0].clone());
    let parsed = |run: &Run| Run::parse(&serde_json::to_string(run).unwrap(), "it").unwrap_err().to_string();
    assert!(parsed(&twice).ends_with("it has pp16 (2 threads) twice"), "{}", parsed(&twice));
    twice.tests.clear();
    assert!(parsed(&twice).ends_with("it has no tests"));
}

#[test]
fn a_history_grows_line_by_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("runs.jsonl");
    assert!(matches!(read_history(&path), Err(RunError::Read { .. })));
    append(&path, &run([1.0, 2.0])).unwrap();
    // As an editor may leave it.
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.trim_end()).unwrap();
    append(&path, &run([3.0, 4.0])).unwrap();
    assert_eq!(read_history(&path).unwrap(), [run([1.0, 2.0]), run([3.0, 4.0])]);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, &text[..text.len() - 9]).unwrap();
    let error = read_history(&path).unwrap_err().to_string();
    assert!(error.starts_with(&format!("line 2 of {} is no run", path.display())), "{error}");
    std::fs::write(&path, "\n").unwrap();
    assert!(matches!(read_history(&path), Err(RunError::Empty(_))));
}
