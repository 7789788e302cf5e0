//! The payload of a plan: framed, so that its checksum holds, then read, validated and run on a model that fits.

use crate::execute::execute;
use serde_json::{Value, json};
use sinter::plan::{FORMAT, LoadedPlan, Plan};
use sinter::show::Diagram;
use sinter::show::dot::dot;

/// What [`run`] returns of a plan that runs.
#[allow(dead_code, reason = "a fuzz target does not ask")]
pub const DEEPEST: usize = 2;

/// Returns how far the payload got: refused, valid, executed.
pub fn run(payload: &[u8]) -> usize {
    let plans = match LoadedPlan::all_from_bytes(&frame(payload)) {
        Ok(plans) => plans,
        Err(e) => {
            _ = e.to_string();
            return 0;
        }
    };
    plans.iter().map(of_one).max().unwrap()
}

/// How far a valid plan got.
fn of_one(plan: &LoadedPlan) -> usize {
    let bytes = plan.to_bytes().unwrap();
    let again = LoadedPlan::from_bytes(&bytes).unwrap();
    assert!(again.to_bytes().unwrap() == bytes);
    _ = plan.to_string();
    for (index, program) in plan.programs.iter().enumerate() {
        _ = dot(&Diagram::of_plan(plan, program, index % 2 == 0));
        _ = plan.bytes_per_step(index, &program.bounds, u64::MAX);
    }
    1 + usize::from(execute(plan))
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"SINTERPL".to_vec();
    bytes.extend(FORMAT.to_le_bytes());
    bytes.extend((payload.len() as u64).to_le_bytes());
    bytes.extend(blake3::hash(payload).as_bytes());
    bytes.extend(payload);
    bytes
}

/// Changes some fields of a plan, valid or not, so that what comes of it can be decoded.
pub fn mutate(payload: &[u8], seed: u64) -> Option<Vec<u8>> {
    let mut random = Random(seed);
    let plans: Vec<Plan> = postcard::from_bytes(payload).ok()?;
    let mut tree = serde_json::to_value(&plans).ok()?;
    for _ in 0..=random.below(3) {
        let mut places = vec![];
        collect(&tree, String::new(), &mut places);
        let place = &places[random.below(places.len())];
        let other = &places[random.below(places.len())];
        let other = tree.pointer(other)?.clone();
        change(tree.pointer_mut(place)?, &other, &mut random);
    }
    let plans: Vec<Plan> = serde_json::from_value(tree).ok()?;
    postcard::to_stdvec(&plans).ok()
}

/// The places of numbers, words and lists.
fn collect(value: &Value, at: String, places: &mut Vec<String>) {
    match value {
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| collect(item, format!("{at}/{i}"), places));
            places.push(at);
        }
        Value::Object(fields) => {
            let key = |key: &str| key.replace('~', "~0").replace('/', "~1");
            fields.iter().for_each(|(name, field)| collect(field, format!("{at}/{}", key(name)), places));
        }
        _ => places.push(at),
    }
}

fn change(value: &mut Value, other: &Value, random: &mut Random) {
    match value {
        Value::Array(items) if !items.is_empty() => {
            let (i, j) = (random.below(items.len()), random.below(items.len()));
            match random.below(4) {
                0 => drop(items.remove(i)),
                1 => items.insert(j, items[i].clone()),
                2 => items.swap(i, j),
                _ => items.truncate(i),
            }
        }
        Value::Number(n) if n.is_u64() => {
            let n = n.as_u64().unwrap_or_default();
            let around =
                [n.wrapping_add(1), n.wrapping_sub(1), n.wrapping_mul(2), n / 2, n ^ 1 << random.below(64)];
            let extremes = [0, 1, 2, 255, 1 << 31, u64::from(u32::MAX), i64::MAX as u64, u64::MAX];
            *value = match random.below(3) {
                0 => json!(around[random.below(around.len())]),
                1 => json!(extremes[random.below(extremes.len())]),
                _ => other.clone(),
            };
        }
        _ => *value = other.clone(),
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ x >> 31) % n as u64) as usize
    }
}
