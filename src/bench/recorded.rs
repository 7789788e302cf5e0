//! Launches that a profiler of a GPU's maker recorded, read from its CSV, and the steps of a plan that are found among them.
//!
//! Known are `rocprofv3 --kernel-trace` (columns `Kernel_Name`, `Start_Timestamp`, `End_Timestamp`), rocprof's `results.csv`
//! (`KernelName`, `DurationNs`, and `BeginNs` where it has it) and `ncu --csv --page raw` (`Kernel Name`, `gpu__time_duration.sum`, with
//! the units in the row below).

use super::profile::{LaunchTime, Profile, filled, step_of};
use super::{BenchError, Test};
use crate::codegen::spec::Code;
use crate::ir::Syms;
use crate::plan::Plan;
use crate::target::TargetKind;
use csv::StringRecord;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What wrote a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    Rocprofv3,
    Rocprof,
    Ncu,
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tool::Rocprofv3 => "rocprofv3",
            Tool::Rocprof => "rocprof",
            Tool::Ncu => "ncu",
        })
    }
}

impl Tool {
    /// Whether it records the launches of such a device.
    pub fn sees(self, kind: TargetKind) -> bool {
        match self {
            Tool::Rocprofv3 | Tool::Rocprof => kind == TargetKind::HipAmd,
            Tool::Ncu => kind == TargetKind::HipNvidia,
        }
    }
}

/// The launches of a file, in the order in which they began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    pub tool: Tool,
    pub launches: Vec<Launch>,
}

/// A launch of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// As its function is called.
    pub kernel: String,
    /// On the profiler's clock, where it says so.
    pub start_ns: Option<u64>,
    pub ns: u64,
}

/// What is no such file.
#[derive(Debug, thiserror::Error)]
pub enum RecordedError {
    #[error(
        "no line has the columns of rocprofv3 --kernel-trace (Kernel_Name, Start_Timestamp, End_Timestamp), of rocprof (KernelName, \
         DurationNs) or of ncu --csv --page raw (Kernel Name, gpu__time_duration.sum)"
    )]
    Foreign,
    #[error("line {line}: {why}")]
    Line { line: u64, why: String },
    #[error("{tool} recorded no kernel")]
    Empty { tool: Tool },
    #[error(
        "{a} and {b} launch the same kernels in the same order, and cannot be told apart; leave one out (-p 0)"
    )]
    Alike { a: Test, b: Test },
    #[error("the plan is for {target}, and these are a GPU's profilers")]
    NoGpu { target: String },
    #[error(transparent)]
    Test(#[from] BenchError),
    #[error(
        "of {all} launches {known} are of kernels that the plan has, and nowhere are all those of a step of {tests} in order; what was \
         recorded must be of the same plan, with each launch by itself (--no-graph)"
    )]
    NoStep { all: usize, known: usize, tests: String },
}

impl Recorded {
    /// Reads the CSV of one of the profilers. What stands before the line of its columns is the program's own output.
    ///
    /// # Errors
    /// A file of none of them; a line that cannot be read, by its number.
    pub fn from_csv(text: &str) -> Result<Recorded, RecordedError> {
        let mut reader =
            csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
        let mut columns: Option<Columns> = None;
        let mut launches = vec![];
        for record in reader.records() {
            let line = |e: &csv::Error| e.position().map_or(0, csv::Position::line);
            let record = record.map_err(|e| RecordedError::Line { line: line(&e), why: e.to_string() })?;
            // Its own lines stand between those of the table.
            if record.get(0).is_some_and(|cell| cell.starts_with("==")) {
                continue;
            }
            let at = record.position().map_or(0, csv::Position::line);
            let in_line = |why: String| RecordedError::Line { line: at, why };
            match &mut columns {
                None => columns = Columns::of(&record).map_err(in_line)?,
                Some(columns) => launches.extend(columns.launch(&record).map_err(in_line)?),
            }
        }
        let tool = columns.ok_or(RecordedError::Foreign)?.tool;
        if launches.is_empty() {
            return Err(RecordedError::Empty { tool });
        }
        // ncu numbers them as they came.
        launches.sort_by_key(|launch| launch.start_ns);
        Ok(Recorded { tool, launches })
    }
}

/// Where in a line things are.
struct Columns {
    tool: Tool,
    count: usize,
    name: usize,
    /// In nanoseconds: when it began, and when it ended or how long it took.
    start: Option<usize>,
    end: Option<usize>,
    duration: Option<usize>,
    /// What says whether a line is of a kernel.
    kind: Option<usize>,
    /// Nanoseconds of a unit of the durations; none until a row of units was read.
    unit: Option<f64>,
}

impl Columns {
    /// If these are the names of columns.
    fn of(names: &StringRecord) -> Result<Option<Columns>, String> {
        let find = |name: &str| names.iter().position(|cell| cell.trim() == name);
        let need =
            |name: &str, hint: &str| find(name).ok_or_else(|| format!("there is no column {name}{hint}"));
        let columns = |tool, name| Columns {
            tool,
            count: names.len(),
            name,
            start: None,
            end: None,
            duration: None,
            kind: None,
            unit: Some(1.0),
        };
        if let Some(name) = find("Kernel_Name") {
            let (start, end) = (need("Start_Timestamp", "")?, need("End_Timestamp", "")?);
            let kind = find("Kind");
            let found = columns(Tool::Rocprofv3, name);
            return Ok(Some(Columns { start: Some(start), end: Some(end), kind, ..found }));
        }
        if let Some(name) = find("KernelName") {
            let (start, end) = (find("BeginNs"), find("EndNs"));
            let duration = match start.and(end) {
                Some(_) => find("DurationNs"),
                None => Some(need("DurationNs", ": give rocprof --timestamp on")?),
            };
            return Ok(Some(Columns { start, end, duration, ..columns(Tool::Rocprof, name) }));
        }
        // Of the program's own output, a line may hold these words too.
        let Some(name) = find("Kernel Name").filter(|_| find("ID").is_some()) else { return Ok(None) };
        let duration =
            need("gpu__time_duration.sum", ": give ncu --page raw --metrics gpu__time_duration.sum")?;
        Ok(Some(Columns { duration: Some(duration), unit: None, ..columns(Tool::Ncu, name) }))
    }

    /// The launch of a line; none if it is of something else.
    fn launch(&mut self, record: &StringRecord) -> Result<Option<Launch>, String> {
        if record.len() != self.count {
            return Err(format!("there are {} cells, and {} columns", record.len(), self.count));
        }
        let Some(unit) = self.unit else {
            let name = self.duration.map_or("", |i| &record[i]);
            self.unit = Some(nanoseconds(name).ok_or_else(|| format!("{name:?} is no unit of time"))?);
            return Ok(None);
        };
        if self.kind.is_some_and(|i| &record[i] != "KERNEL_DISPATCH") {
            return Ok(None);
        }
        let number = |i: usize| {
            let value = grouped(&record[i]).filter(|x| x.is_finite() && *x >= 0.0);
            value.ok_or_else(|| format!("{:?} is no time", &record[i]))
        };
        // A clock has more digits than a float.
        let moment =
            |i: usize| record[i].trim().parse::<u64>().map_err(|_| format!("{:?} is no time", &record[i]));
        let start_ns = self.start.map(moment).transpose()?;
        let ns = match (self.duration, start_ns, self.end.map(moment).transpose()?) {
            (Some(duration), ..) => (number(duration)? * unit).round() as u64,
            (None, Some(start), Some(end)) => end
                .checked_sub(start)
                .ok_or_else(|| format!("it ends at {end}, before it begins at {start}"))?,
            (None, ..) => 0,
        };
        Ok(Some(Launch { kernel: function(&record[self.name]).into(), start_ns, ns }))
    }
}

/// Nanoseconds of a unit, as ncu calls it.
fn nanoseconds(unit: &str) -> Option<f64> {
    match unit.trim() {
        "ns" | "nsecond" => Some(1.0),
        "us" | "usecond" => Some(1e3),
        "ms" | "msecond" => Some(1e6),
        "s" | "second" => Some(1e9),
        _ => None,
    }
}

/// A number as people read it, which is how ncu writes them: `1,234.50`, and `1.234,50` where that is the custom.
fn grouped(text: &str) -> Option<f64> {
    let text = text.trim();
    let decimal_comma =
        text.rsplit_once(',').is_some_and(|(_, after)| after.len() != 3 && !after.contains('.'));
    let plain = match decimal_comma {
        true => text.replace('.', "").replace(',', "."),
        false => text.replace(',', ""),
    };
    plain.parse().ok()
}

/// The name of a function, without what profilers put behind it: its parameters, or the ending of its descriptor.
fn function(name: &str) -> &str {
    let name = name.split(['(', '[']).next().unwrap_or_default().trim();
    name.strip_suffix(".kd").unwrap_or(name)
}

/// What a file says of the steps of a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Matched {
    /// Of those tests of which there are whole steps.
    pub profiles: Vec<(Test, Profile)>,
    /// Tests of which there is none.
    pub missing: Vec<Test>,
    /// Launches of kernels that the plan has, but in no such step.
    pub others: usize,
    /// Launches of kernels that no step of the tests has, by name.
    pub foreign: BTreeMap<String, usize>,
}

/// Finds the steps of tests among the launches: wherever all those of a step stand in order.
///
/// # Errors
/// If there is no step, the plan has no program for a test, or two tests cannot be told apart.
pub fn match_steps(plan: &Plan, tests: &[Test], recorded: &Recorded) -> Result<Matched, RecordedError> {
    let mut wanted = vec![];
    for test in tests {
        let (program, at) = step_of(plan, test)?;
        let launches = launches_of(plan, program, &at)?;
        wanted.push(Wanted { test: *test, program, at, launches, steps: vec![] });
    }
    for (i, a) in wanted.iter().enumerate() {
        let names = |wanted: &Wanted<'_>| {
            wanted.launches.iter().map(|(.., name)| name.to_string()).collect::<Vec<_>>()
        };
        if let Some(b) = wanted[..i].iter().find(|b| names(a) == names(b)) {
            return Err(RecordedError::Alike { a: b.test, b: a.test });
        }
    }
    let names: BTreeSet<&str> =
        wanted.iter().flat_map(|wanted| wanted.launches.iter().map(|(.., name)| *name)).collect();
    let (known, others): (Vec<&Launch>, Vec<&Launch>) =
        recorded.launches.iter().partition(|launch| names.contains(launch.kernel.as_str()));
    let mut foreign = BTreeMap::new();
    for launch in others {
        *foreign.entry(launch.kernel.clone()).or_default() += 1;
    }
    let (mut i, mut apart) = (0, 0);
    while i < known.len() {
        let step = wanted.iter_mut().find_map(|wanted| wanted.take(&known[i..]));
        apart += usize::from(step.is_none());
        i += step.unwrap_or(1);
    }
    let (all, tests) =
        (recorded.launches.len(), tests.iter().map(Test::to_string).collect::<Vec<_>>().join(" or "));
    if wanted.iter().all(|wanted| wanted.steps.is_empty()) {
        return Err(RecordedError::NoStep { all, known: known.len(), tests });
    }
    let (mut profiles, mut missing) = (vec![], vec![]);
    for Wanted { test, program, at, steps, .. } in wanted {
        match steps.is_empty() {
            true => missing.push(test),
            false => profiles.push((test, Profile::of(plan, program, at, filled(plan, &test), &steps))),
        }
    }
    Ok(Matched { profiles, missing, others: apart, foreign })
}

/// A step to be found.
struct Wanted<'a> {
    test: Test,
    program: usize,
    at: Syms,
    /// Call, launch of the call, and name of the function.
    launches: Vec<(usize, usize, &'a str)>,
    steps: Vec<Vec<LaunchTime>>,
}

impl Wanted<'_> {
    /// Takes the step with which these begin: how many launches it has.
    fn take(&mut self, known: &[&Launch]) -> Option<usize> {
        let found = known.get(..self.launches.len()).filter(|found| !found.is_empty())?;
        let same = found.iter().zip(&self.launches).all(|(launch, (.., name))| launch.kernel == *name);
        if !same {
            return None;
        }
        let (first, mut clock) = (found[0].start_ns, 0);
        let step = found.iter().zip(&self.launches).map(|(recorded, &(call, launch, _))| {
            let since = recorded.start_ns.zip(first).map(|(start, first)| start.saturating_sub(first));
            let start_ns = since.unwrap_or(clock);
            clock = start_ns.saturating_add(recorded.ns);
            LaunchTime { call, launch, start_ns, ns: recorded.ns }
        });
        self.steps.push(step.collect());
        Some(self.launches.len())
    }
}

/// The launches of a step of a program, in order: call, launch of the call, and name of the function.
fn launches_of<'a>(
    plan: &'a Plan,
    program: usize,
    at: &Syms,
) -> Result<Vec<(usize, usize, &'a str)>, RecordedError> {
    let mut launches = vec![];
    for (i, call) in plan.programs[program].calls.iter().enumerate() {
        for (n, launch) in plan.kernels[call.kernel as usize].launches.iter().enumerate() {
            let Code::Hip(code) = &launch.code else {
                return Err(RecordedError::NoGpu { target: plan.target.name.clone() });
            };
            if launch.grid.iter().all(|extent| extent.eval(at) > 0) {
                launches.push((i, n, code.entry.as_str()));
            }
        }
    }
    Ok(launches)
}
