//! A profile in the trace event format of Chrome, which Perfetto (ui.perfetto.dev) shows too. Its fields are documented in
//! "Trace Event Format", <https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>: complete events (`X`) and
//! metadata (`M`); times in microseconds.

use super::report::{FirstToken, Load};
use serde_json::{Value, json};
use sinter::bench::{Profile, Test};
use std::collections::BTreeSet;

/// Between one part of the trace and the next.
const GAP_US: f64 = 1000.0;
/// The thread of what spans others; those of streams follow.
const WHOLE: u32 = 0;

/// What happened until there was a token, then one step of each test, one after the other.
pub fn trace(
    model: &str,
    target: &str,
    load: Option<(&Load, Option<&FirstToken>)>,
    steps: &[(Test, Profile)],
) -> Value {
    let mut events = vec![];
    let mut clock = 0.0;
    if let Some((load, first)) = load {
        clock = GAP_US + of_load(load, first, &mut events);
    }
    for (i, (test, profile)) in steps.iter().enumerate() {
        clock = GAP_US + of_step(i as u32 + 2, test, profile, clock, &mut events);
    }
    json!({
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": { "model": model, "target": target, "sinter": env!("CARGO_PKG_VERSION") },
    })
}

fn name(what: &str, pid: u32, tid: u32, name: &str) -> Value {
    json!({ "ph": "M", "name": what, "pid": pid, "tid": tid, "args": { "name": name } })
}

/// The process that is loading; the end of its last event.
fn of_load(load: &Load, first: Option<&FirstToken>, events: &mut Vec<Value>) -> f64 {
    let (pid, all) = (1, 1e3 * first.map_or(load.all_ms, |first| first.all_ms));
    let whole = if first.is_some() { "time to first token" } else { "loading" };
    events.push(name("process_name", pid, WHOLE, whole));
    events.push(name("thread_name", pid, WHOLE, "host"));
    let event = |name: &str, ts: f64, dur: f64, args: Value| json!({ "ph": "X", "name": name, "cat": "load", "pid": pid, "tid": WHOLE, "ts": ts, "dur": dur, "args": args });
    events.push(event(whole, 0.0, all, json!({})));
    let mut parts = load.parts();
    parts.extend(first.map(FirstToken::parts).unwrap_or_default());
    let mut ts = 0.0;
    for (name, ms, about) in parts {
        // What adds up to the whole does not end after it, whatever floats say.
        let dur = (1e3 * ms).min(all - ts);
        events.push(event(name, ts, dur, json!({ "about": about })));
        ts += dur;
    }
    all
}

/// The process of a step: a thread that spans it, and one for each stream.
fn of_step(pid: u32, test: &Test, profile: &Profile, from: f64, events: &mut Vec<Value>) -> f64 {
    let us = |ns: u64| ns as f64 / 1e3;
    events.push(name("process_name", pid, WHOLE, &format!("{test} (program {})", profile.program)));
    events.push(name("thread_name", pid, WHOLE, "step"));
    let streams: BTreeSet<u32> =
        profile.launches.iter().map(|launch| profile.nodes[launch.call].stream).collect();
    for stream in &streams {
        events.push(name("thread_name", pid, stream + 1, &format!("stream {stream}")));
    }
    let end = profile.launches.iter().map(|launch| launch.start_ns + launch.ns).max().unwrap_or(0);
    events.push(json!({
        "ph": "X", "name": test.to_string(), "cat": "step", "pid": pid, "tid": WHOLE, "ts": from, "dur": us(end),
        "args": { "program": profile.program, "T": profile.at.t, "R": profile.at.r },
    }));
    for launch in &profile.launches {
        let node = &profile.nodes[launch.call];
        // Of a call of several launches, nobody knows which moves what.
        let of_call = profile.launches.iter().filter(|other| other.call == launch.call);
        let (ns, count) = of_call.fold((0, 0), |(ns, n), other| (ns + other.ns, n + 1));
        events.push(json!({
            "ph": "X",
            "name": node.kernel,
            "cat": "kernel",
            "pid": pid,
            "tid": node.stream + 1,
            "ts": from + us(launch.start_ns),
            "dur": us(launch.ns),
            "args": {
                "node": node.node,
                "call": launch.call,
                "launch": launch.launch,
                "launches_of_call": count,
                "bytes_of_call": node.work.bytes,
                "operations_of_call": node.work.operations,
                "gbs": node.work.bytes as f64 / ns.max(1) as f64,
            },
        }));
    }
    from + us(end)
}
