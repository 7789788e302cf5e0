use super::*;
use crate::codegen::spec::{Call, Computation, Layout, Place};
use crate::gguf::{GgmlType, GgufWriter};
use crate::ir::{Kernel, Op, Slice};
use crate::plan::tests::parts;
use crate::plan::{BufRef, Parts};
use crate::runtime::cpu::reserve;
use crate::runtime::device::Timing;
use crate::target::{Target, TargetKind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn table() -> Vec<f32> {
    (0..40).map(|i| i as f32 * 0.125 - 2.0).collect()
}

fn bias() -> Vec<f32> {
    (0..8).map(|i| 1.0 / (i + 1) as f32).collect()
}

fn f32_type() -> GgmlType {
    GgmlType::from_id(0).unwrap()
}

/// A model whose table is called `name`.
fn file(name: &str, table: &[f32], shape: &[u64]) -> Arc<GgufFile> {
    let (bias, mut out) = (bias(), vec![]);
    let mut writer = GgufWriter::new();
    let f32s = |x: &[f32]| bytemuck::cast_slice::<f32, u8>(x).to_vec();
    writer.tensor(name, f32_type(), shape, f32s(table)).unwrap();
    writer.tensor("bias", f32_type(), &[8], f32s(&bias)).unwrap();
    writer.write_to(&mut out).unwrap();
    Arc::new(GgufFile::from_bytes(out).unwrap())
}

fn model() -> Arc<GgufFile> {
    file("table", &table(), &[5, 8])
}

fn options() -> DeviceOptions {
    DeviceOptions { threads: Some(2), ..DeviceOptions::default() }
}

/// An executor of the toy programs, by way of bytes, after `change`.
fn try_new(model: Arc<GgufFile>, change: impl FnOnce(&mut Parts)) -> Result<Executor, ExecError> {
    let mut parts = parts(model.identity());
    change(&mut parts);
    let bytes = Plan::build(parts)?.to_bytes()?;
    Executor::new(LoadedPlan::from_bytes(&bytes)?, model, &options())
}

fn executor() -> Executor {
    try_new(model(), |_| ()).unwrap()
}

fn refused(result: Result<Executor, ExecError>) -> String {
    result.err().unwrap().to_string()
}

/// What the toy should make of all tokens so far.
fn expected(tokens: &[i32]) -> Vec<f32> {
    let (table, bias) = (table(), bias());
    let row =
        |t: &i32| table[*t as usize * 8..][..8].iter().zip(&bias).map(|(a, b)| a + b).collect::<Vec<_>>();
    tokens.iter().flat_map(row).map(|x| x / (1.0 + (-x).exp())).collect()
}

fn close(have: &[f32], want: &[f32]) {
    assert_eq!(have.len(), want.len());
    for (h, w) in have.iter().zip(want) {
        assert!((h - w).abs() <= 1e-5, "{have:?} is not {want:?}");
    }
}

/// Tokens of the one sequence, after others.
fn rows(tokens: &[i32], cached: i32) -> StepRows {
    let end = cached + tokens.len() as i32;
    let rows: Vec<i32> = (cached..end).collect();
    StepRows { tokens: tokens.to_vec(), rows, tables: vec![0], lengths: vec![end], ..StepRows::default() }
}

const PREFILL: usize = 0;
const DECODE: usize = 1;

/// The rows that are filled; the others are zero.
fn filled(exec: &mut Executor, tokens: usize) -> Vec<f32> {
    let mut all = vec![];
    exec.read_f32(0, 0..1, &mut all).unwrap();
    assert!(all.len() == 128 && all[tokens * 8..].iter().all(|x| *x == 0.0), "{all:?}");
    all[..tokens * 8].to_vec()
}

#[test]
fn programs_run_and_states_last_from_step_to_step() {
    let mut exec = executor();
    let tokens = [3, 0, 4, 1, 2, 2, 0];
    exec.forward(PREFILL, &rows(&tokens[..4], 0)).unwrap();
    close(&filled(&mut exec, 4), &expected(&tokens[..4]));
    for i in 4..7 {
        exec.forward(DECODE, &rows(&tokens[i..=i], i as i32)).unwrap();
        close(&filled(&mut exec, i + 1), &expected(&tokens[..=i]));
    }
    assert_eq!(exec.result(0).unwrap().len(), 16 * 8 * 4);
    // In other chunks, the same.
    for (chunk, at) in [(&tokens[..3], 0), (&tokens[3..6], 3), (&tokens[6..], 6)] {
        exec.forward(PREFILL, &rows(chunk, at)).unwrap();
    }
    close(&filled(&mut exec, 7), &expected(&tokens));
}

#[test]
fn rows_of_states_are_copied_and_filled() {
    let mut exec = executor();
    exec.forward(PREFILL, &rows(&[1, 2], 0)).unwrap();
    exec.copy_rows(StateRole::Appended, 0, 2, 2).unwrap();
    // The next token lies after the copies.
    exec.forward(DECODE, &rows(&[3], 4)).unwrap();
    close(&filled(&mut exec, 5), &expected(&[1, 2, 1, 2, 3]));
    exec.fill_rows(StateRole::Appended, 1, 2, 0xff).unwrap();
    exec.forward(DECODE, &rows(&[3], 4)).unwrap();
    let mut all = vec![];
    exec.read_f32(0, 0..1, &mut all).unwrap();
    let nan: Vec<bool> = all.chunks(8).map(|row| row[0].is_nan()).collect();
    assert_eq!(nan[..5], [false, true, true, false, false]);
    // No state is replaced.
    exec.copy_rows(StateRole::Replaced, 0, 99, 1).unwrap();
    let says = exec.copy_rows(StateRole::Appended, 0, 15, 2).unwrap_err().to_string();
    assert_eq!(says, "state \"cache\" has no rows 15 to 17");
    let says = exec.copy_rows(StateRole::Appended, 2, 3, 2).unwrap_err().to_string();
    assert_eq!(says, "2 rows from 2 and from 3 on overlap");
    assert!(exec.fill_rows(StateRole::Appended, u64::MAX, 2, 0).is_err());
}

#[test]
fn launches_are_counted_by_kernel() {
    let mut exec = executor();
    assert!(exec.launch_counts().is_empty());
    exec.forward(PREFILL, &rows(&[1, 2], 0)).unwrap();
    exec.forward(DECODE, &rows(&[1], 2)).unwrap();
    let counts: Vec<_> = exec.launch_counts().into_iter().collect();
    assert_eq!(counts, [("get_rows", 2), ("add", 2), ("kv_append", 2), ("silu", 2), ("kv_read", 2)]);
}

#[test]
fn steps_out_of_bounds_are_refused_and_change_nothing() {
    let mut exec = executor();
    assert_eq!(exec.result(0).unwrap_err().to_string(), "nothing has run yet, so there are no results");
    exec.forward(PREFILL, &rows(&[1], 0)).unwrap();
    let mut says = |program, step: &StepRows| exec.forward(program, step).unwrap_err().to_string();
    assert_eq!(says(2, &rows(&[1], 0)), "the plan has no program 2: there are 2");
    for n in [0, 5] {
        let sizes = format!("takes 1 to 4 token rows a step, of which 0 to 0 wanted, not {n} of which 0");
        assert_eq!(says(PREFILL, &rows(&vec![1; n], 0)), format!("program \"prefill\" {sizes}"));
    }
    let wanted = StepRows { wanted: vec![0], ..rows(&[1], 0) };
    assert!(says(PREFILL, &wanted).ends_with("not 1 of which 1"));
    assert_eq!(says(PREFILL, &rows(&[1; 4], 13)), "input \"rows\" must lie in 0..16, not 16");
    assert_eq!(says(PREFILL, &rows(&[0, 5], 0)), "input \"tokens\" must lie in 0..5, not 5");
    assert_eq!(says(PREFILL, &rows(&[-1], 0)), "input \"tokens\" must lie in 0..5, not -1");
    let twice = StepRows { rows: vec![3, 5, 3], ..rows(&[0; 3], 0) };
    assert_eq!(says(PREFILL, &twice), "input \"rows\" must not have 3 twice");
    let page = StepRows { tables: vec![1], ..rows(&[0], 0) };
    assert_eq!(says(PREFILL, &page), "input \"tables\" must lie in 0..1, not 1");
    let length = StepRows { lengths: vec![17], ..rows(&[0], 0) };
    assert_eq!(says(PREFILL, &length), "input \"lengths\" must lie in 0..17, not 17");
    let at = Syms { t: 1, r: 0 };
    let mut step = |inputs: &[(&str, &[u8])]| exec.step(DECODE, &at, inputs).unwrap_err().to_string();
    let takes = "program \"decode\" takes the inputs tokens, rows, tables, lengths";
    assert_eq!(step(&[]), takes);
    let four: &[u8] = &[0; 4];
    assert_eq!(step(&[("tokens", four), ("rows", four), ("tables", four), ("positions", four)]), takes);
    assert_eq!(
        step(&[("tokens", &[0; 5]), ("rows", four), ("tables", four), ("lengths", four)]),
        "input \"tokens\" takes 4 bytes in this step, not 5"
    );
    // The results of the last good step are still there.
    close(&filled(&mut exec, 1), &expected(&[1]));
    assert_eq!(exec.result(1).unwrap_err().to_string(), "program \"prefill\" has 1 results, so none at 1");
    let says = exec.read_i32(0, 0..1, &mut vec![]).unwrap_err().to_string();
    assert_eq!(says, "result 0 is f32, not i32");
    let says = exec.read_f32(0, 0..2, &mut vec![]).unwrap_err().to_string();
    assert_eq!(says, "result 0 has 1 rows, so none at 0 to 2");
    let (start, end) = (1, 0);
    assert!(exec.read_f32(0, start..end, &mut vec![]).is_err());
}

#[test]
fn a_missing_kernel_is_named() {
    let wrong = |parts: &mut Parts| {
        for (program, _) in &mut parts.programs {
            let Computation::Op(p) = &mut program.kernels[3].spec.computes else { unreachable!() };
            *p = Op::QuantAct;
            program.kernels[3].spec.kernel = Some(Kernel::Attention);
        }
    };
    let says = refused(try_new(model(), wrong));
    assert!(says.starts_with("the cpu device has no kernel attention as the plan needs it: "), "{says}");
}

#[test]
fn a_plan_runs_only_where_it_should() {
    let bytes = Plan::build(parts(model().identity())).unwrap().to_bytes().unwrap();
    let plan = LoadedPlan::from_bytes(&bytes).unwrap();
    let other = file("table", &bias().repeat(5), &[5, 8]);
    let says = refused(Executor::new(plan, other, &options()));
    assert!(says.starts_with("the plan was compiled for another model file: "), "{says}");

    let says = refused(try_new(model(), |p| p.target = Target::test_wave32()));
    assert!(says.starts_with("there is no device of kind hip-amd here: "), "{says}");

    let mut plan = Plan::build(parts(model().identity())).unwrap();
    plan.kernels_hash = "old".into();
    let plan = LoadedPlan::from_bytes(&plan.to_bytes().unwrap()).unwrap();
    let says = refused(Executor::new(plan, model(), &options()));
    assert!(says.contains("kernels have changed"), "{says}");
}

#[test]
fn weights_must_be_as_the_plan_has_them() {
    let says = refused(try_new(file("other", &table(), &[5, 8]), |_| ()));
    assert_eq!(says, "tensor \"table\" is missing");
    let says = refused(try_new(file("table", &table(), &[8, 5]), |_| ()));
    assert_eq!(says, "the plan needs tensor \"table\" as f32[5,8], the file has f32[8,5]");
}

#[test]
fn a_weight_may_be_rows_of_a_tensor() {
    let whole: Vec<f32> = [vec![9.0; 16], table(), vec![9.0; 8]].concat();
    let rows = |first, of| {
        move |parts: &mut Parts| {
            for (program, _) in &mut parts.programs {
                program.buffers[1].place = Place::Weight {
                    name: "table".into(),
                    rows: Some(Slice { first, of }),
                    layout: Layout::RowMajor,
                };
            }
        }
    };
    let mut exec = try_new(file("table", &whole, &[8, 8]), rows(2, 8)).unwrap();
    exec.forward(PREFILL, &self::rows(&[3, 0, 4], 0)).unwrap();
    close(&filled(&mut exec, 3), &expected(&[3, 0, 4]));
    assert_eq!(exec.plan().to_string().matches("\"table\" f32[5,8] from 2 of 8").count(), 1);
    // Tensors of other sizes are not what the plan was compiled for, even if they have such rows.
    let says = refused(try_new(file("table", &whole, &[8, 8]), rows(2, 7)));
    assert_eq!(says, "the plan needs tensor \"table\" as f32[7,8], the file has f32[8,8]");
    let says = refused(try_new(file("table", &whole, &[8, 8]), |_| ()));
    assert_eq!(says, "the plan needs tensor \"table\" as f32[5,8], the file has f32[8,8]");
}

#[test]
fn a_context_beyond_all_memory_is_refused() {
    let (context, heads) = (1u64 << 30, 1u64 << 20);
    let huge = |parts: &mut Parts| {
        parts.options.context = context;
        for (program, _) in &mut parts.programs {
            program.bounds = Syms { t: 1, r: 0 };
            // No launch reads all of the cache, so that no activation is as large.
            program.calls.truncate(2);
            program.results = vec![4];
            program.kernels.truncate(3);
            for ty in [&mut program.buffers[5].ty, &mut program.kernels[2].spec.args[0].ty] {
                ty.shape = [context, heads, 8].map(Into::into).into();
            }
            program.kernels[2].spec.args[1].ty.shape = vec![1.into(), 8.into()];
            program.calls.push(Call { kernel: 2, args: vec![5, 4, 8], label: "append".into() });
        }
    };
    let mut parts = parts(model().identity());
    huge(&mut parts);
    let plan = Plan::build(parts).unwrap();
    assert_eq!(plan.state_bytes(), context * heads * 32);
    let says = reserve(&plan).unwrap_err().to_string();
    assert!(says.starts_with("a context of 1073741824 needs 36028797.0 GB for the KV cache and "), "{says}");
    assert!(says.ends_with("; use a smaller context (-c)"), "{says}");
}

/// Weights that are repacked take memory; others stay in the file.
#[test]
fn weights_that_are_repacked_must_fit_beside_the_caches() {
    let mut plan = Plan::build(parts(model().identity())).unwrap();
    plan.weights[0].ty = TensorType::new(DType::Q4_K, [1 << 24, 1 << 26]);
    assert!(reserve(&plan).is_ok());
    plan.weights[0].layout = Layout::Interleaved16;
    // Nothing but Linux says how much memory is free.
    if cfg!(target_os = "linux") {
        let says = reserve(&plan).unwrap_err().to_string();
        assert!(says.contains(" for activations beside 633318.7 GB of weights, but "), "{says}");
    }
}

#[test]
fn threads_and_overlaps_do_not_change_results() {
    for threads in [1, 3] {
        let plan = Plan::build(parts(model().identity())).unwrap();
        let plan = LoadedPlan::from_bytes(&plan.to_bytes().unwrap()).unwrap();
        // The sum lies where the rows lay: the alias is used.
        let decode = &plan.programs[DECODE];
        let place = |arg: BufRef| match arg {
            BufRef::Arena(b) => decode.buffers[b as usize].offset,
            _ => u64::MAX,
        };
        assert_eq!(place(decode.calls[1].args[0]), place(decode.calls[1].args[2]));
        let options = DeviceOptions { threads: Some(threads), ..options() };
        let mut exec = Executor::new(plan, model(), &options).unwrap();
        exec.forward(PREFILL, &rows(&[4, 3, 2, 1], 0)).unwrap();
        close(&filled(&mut exec, 4), &expected(&[4, 3, 2, 1]));
    }
}

/// A device that begins nothing before someone waits for it.
struct Late {
    device: Box<dyn Device>,
    waiting: Vec<Submission>,
    submitted: Arc<AtomicU64>,
    done: Arc<AtomicU64>,
}

impl Late {
    fn finish(&mut self) -> Result<(), DeviceError> {
        for work in std::mem::take(&mut self.waiting) {
            self.device.submit(&work)?;
            self.done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Device for Late {
    fn kind(&self) -> TargetKind {
        self.device.kind()
    }

    fn isa(&self) -> &str {
        self.device.isa()
    }

    fn submit(&mut self, work: &Submission) -> Result<Ticket, DeviceError> {
        self.waiting.push(work.clone());
        Ok(Ticket(self.submitted.fetch_add(1, Ordering::Relaxed) + 1))
    }

    fn wait(&mut self, _: Ticket) -> Result<(), DeviceError> {
        self.finish()
    }

    fn write(&mut self, program: usize, to: BufRef, bytes: &[u8]) -> Result<(), DeviceError> {
        self.finish()?;
        self.device.write(program, to, bytes)
    }

    fn read(&mut self, program: usize, from: BufRef, first: u64, to: &mut [u8]) -> Result<(), DeviceError> {
        self.finish()?;
        self.device.read(program, from, first, to)
    }

    fn copy_rows(&mut self, role: StateRole, from: u64, to: u64, rows: u64) -> Result<(), DeviceError> {
        self.finish()?;
        self.device.copy_rows(role, from, to, rows)
    }

    fn fill_rows(&mut self, role: StateRole, first: u64, rows: u64, byte: u8) -> Result<(), DeviceError> {
        self.finish()?;
        self.device.fill_rows(role, first, rows, byte)
    }

    fn launch_counts(&self) -> Vec<u64> {
        self.device.launch_counts()
    }

    fn timings(&mut self) -> Result<Vec<Timing>, DeviceError> {
        self.device.timings()
    }
}

/// The toy on a device of its own.
fn device() -> (Box<dyn Device>, Arc<LoadedPlan>) {
    let bytes = Plan::build(parts(model().identity())).unwrap().to_bytes().unwrap();
    let plan = Arc::new(LoadedPlan::from_bytes(&bytes).unwrap());
    (open(&plan, model(), &options()).unwrap(), plan)
}

#[test]
fn a_step_is_over_when_it_was_waited_for() {
    let (device, plan) = device();
    let (submitted, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let late = Late { device, waiting: vec![], submitted: submitted.clone(), done: done.clone() };
    let mut exec = Executor::on(Box::new(late), plan).unwrap();
    let counts = || [submitted.load(Ordering::Relaxed), done.load(Ordering::Relaxed)];
    exec.wait().unwrap();
    exec.forward(PREFILL, &rows(&[3, 0, 4], 0)).unwrap();
    assert_eq!(counts(), [1, 0], "the host is free while the device works");
    exec.wait().unwrap();
    assert_eq!(counts(), [1, 1]);
    exec.forward(DECODE, &rows(&[1], 3)).unwrap();
    assert_eq!(counts(), [2, 1]);
    // Results and states are those after the step.
    close(&filled(&mut exec, 4), &expected(&[3, 0, 4, 1]));
    assert_eq!(counts(), [2, 2]);
    exec.forward(DECODE, &rows(&[2], 4)).unwrap();
    exec.copy_rows(StateRole::Appended, 4, 5, 1).unwrap();
    exec.forward(DECODE, &rows(&[0], 6)).unwrap();
    close(&filled(&mut exec, 7), &expected(&[3, 0, 4, 1, 2, 2, 0]));
}

#[test]
fn single_calls_are_made_counted_and_timed() {
    let (mut device, plan) = device();
    let at = Syms { t: 2, r: 0 };
    let bytes = |x: &[i32]| bytemuck::cast_slice::<i32, u8>(x).to_vec();
    let tokens = BufRef::Arena(plan.programs[PREFILL].inputs[0].buffer);
    device.write(PREFILL, tokens, &bytes(&[4, 2])).unwrap();
    let mut submit = |calls: Range<usize>, timed| {
        let ticket = device.submit(&Submission { program: PREFILL, calls, at, timed }).unwrap();
        device.wait(ticket).unwrap();
        (device.launch_counts(), device.timings().unwrap())
    };
    let (launches, timings) = submit(0..1, false);
    assert_eq!((&launches[..], &timings[..]), (&[1, 0, 0, 0, 0][..], &[][..]));
    let start = Instant::now();
    let (launches, timings) = submit(0..2, true);
    let all = start.elapsed();
    assert_eq!(launches, [2, 1, 0, 0, 0]);
    assert_eq!(timings.iter().map(|t| (t.call, t.launch)).collect::<Vec<_>>(), [(0, 0), (1, 0)]);
    let sum: Duration = timings.iter().map(|t| t.time).sum();
    assert!(sum > Duration::ZERO && sum <= all, "{sum:?} of {all:?}");
    assert_eq!(submit(1..2, false).1, timings, "what is not timed leaves the times of what was");
    assert_eq!(submit(1..2, true).1.iter().map(|t| t.call).collect::<Vec<_>>(), [1]);
    // The sums of both rows, which lie where the rows lay, and nothing after them.
    submit(0..2, false);
    let call = &plan.programs[PREFILL].calls[1];
    let mut sums = vec![0; 64];
    device.read(PREFILL, call.args[2], 0, &mut sums).unwrap();
    let row = |t: usize| table()[t * 8..][..8].iter().zip(bias()).map(|(a, b)| a + b).collect::<Vec<f32>>();
    close(bytemuck::cast_slice(&sums), &[row(4), row(2)].concat());
    let mut last = vec![0; 4];
    device.read(PREFILL, call.args[2], 60, &mut last).unwrap();
    assert_eq!(last, sums[60..]);
    let mut cache = vec![1; 512];
    device.read(PREFILL, BufRef::State(0), 0, &mut cache).unwrap();
    assert_eq!(cache, [0; 512]);
}

#[test]
#[should_panic(expected = "so none at 510..+4")]
fn a_device_leaves_no_buffer() {
    let (mut device, _) = device();
    _ = device.read(PREFILL, BufRef::State(0), 510, &mut [0; 4]);
}
