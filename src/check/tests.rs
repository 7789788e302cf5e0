use super::kernels::{BESIDE, distance, furthest, rounding_of};
use super::*;
use crate::codegen::spec::{Access, Computation, Implementation, NormSource};
use crate::compile::fuse;
use crate::ir::{DType, StateRole};
use crate::passes::Pipeline;
use crate::plan::BufRef;
use crate::plan::memory::ALIGN;
use crate::runtime::device::{Submission, Ticket, Timing};
use crate::target::{Target, TargetKind};

#[test]
fn infinities_are_as_far_as_they_differ() {
    let tensor =
        |data: [f32; 3]| Tensor::new(DType::F32, vec![3], bytemuck::cast_slice(&data).to_vec()).unwrap();
    let of = |a, b| distance(&tensor(a), &tensor(b)).unwrap();
    let masked = [3.0, 4.0, f32::NEG_INFINITY];
    assert_eq!(of(masked, masked), 0.0);
    assert_eq!(of([3.0, 9.0, f32::NEG_INFINITY], masked), 1.0);
    assert!(of([3.0, 4.0, 5.0], masked).is_nan() && of(masked, [3.0, 4.0, 5.0]).is_infinite());
    assert!(of([f32::NAN; 3], [f32::NAN; 3]).is_nan());
}

/// Columns of one row that are not computed are lost in the error of a long prompt, even beside what a kernel rounds; and what is off everywhere
/// passes as before.
#[test]
fn a_wrong_part_of_one_row_is_found() {
    let result = |change: &dyn Fn(usize, f32) -> f32| {
        let number = |i: usize| (i * 7919 % 1009) as f32 / 504.5 - 1.0;
        let data: Vec<f32> = (0..2048 * 256).map(|i| change(i, number(i))).collect();
        Tensor::new(DType::F32, vec![2048, 256], bytemuck::cast_slice(&data).to_vec()).unwrap()
    };
    let right = result(&|_, x| x);
    let off = |change: &dyn Fn(usize, f32) -> f32| {
        let found = [(result(change), &right)];
        (distance(&found[0].0, &right).unwrap(), furthest(&found, 6e-3).unwrap().unwrap().0)
    };
    let (whole, found) = off(&|i, x| if (77 * 256..77 * 256 + 16).contains(&i) { 0.0 } else { x });
    assert!(whole < 6e-3 && found > 2e-2, "{whole} {found}");
    let (whole, found) = off(&|i, x| x * if i % 3 == 0 { 1.005 } else { 0.995 });
    assert!(whole == found && (4.9e-3..5.1e-3).contains(&whole), "{whole} {found}");
    assert!(off(&|i, x| if i == 300_000 { f32::NAN } else { x }).1.is_nan());
}

/// Eleven bits or eight, and twice as much where weights are rounded too.
#[test]
fn results_may_be_off_by_what_kernels_round() {
    let of = |format: &str, attributes: &str| {
        let text = format!(
            "graph @g(%x: f32[T,256]) sym T<=16, R<=1 {{
              %w = weight \"w\" : {format}[8,256]
              %f = dequant %w : f32[8,256]
              %y = matmul %x, %f {attributes}: f32[T,8]
              return %y
            }}"
        );
        let (mut graph, target) = (Graph::parse(&text).unwrap(), Target::gpu("sm_90").unwrap());
        Pipeline::standard(true).run(&mut graph, &target).unwrap();
        let graph = verify(graph).unwrap();
        let layouts = Layouts::choose([&graph], &target).unwrap();
        let program = codegen::generate(&graph, &target, &layouts).unwrap();
        program.kernels.iter().map(rounding_of).fold(0.0, f64::max)
    };
    let found = [("q4_k", ""), ("f16", "{round=f16} "), ("bf16", "{round=bf16} "), ("q4_k", "{round=f16} ")];
    assert_eq!(found.map(|(format, attributes)| of(format, attributes)), [1e-5, 5e-4, 4e-3, 1e-3]);
    // Attention of many tokens on matrix units rounds queries, and the weights that come of them; of few it rounds nothing.
    let file = model::embedded().unwrap();
    let of_attention = |tokens: u64| {
        let options = Options::new(Target::gpu("sm_90").unwrap());
        let step = Step { tokens, wanted: 1, greedy: false, kv: options.kv, context: 64, sequences: 1 };
        let graph = verify(fuse(file.gguf(), &options, &step).unwrap().0).unwrap();
        let layouts = Layouts::choose([&graph], &options.target).unwrap();
        let program = codegen::generate(&graph, &options.target, &layouts).unwrap();
        let attends = |kernel: &&Implementation| kernel.spec.name().contains("attention");
        program.kernels.iter().filter(attends).map(rounding_of).fold(0.0, f64::max)
    };
    assert_eq!([16, 1].map(of_attention), [1e-3, 1e-5]);
}

/// The kernels of a step of the embedded model after `change`, each beside its body.
fn checked(options: &Options, change: impl Fn(&mut Computation)) -> Vec<NodeCheck> {
    let file = Arc::new(model::embedded().unwrap());
    let step = Step { tokens: 2, wanted: 2, greedy: false, kv: options.kv, context: 8, sequences: 1 };
    let rows = step_rows(&step, &[0, 33], 0);
    let (graph, _) = fuse(file.gguf(), options, &step).unwrap();
    let graph = verify(graph).unwrap();
    let layouts = Layouts::choose([&graph], &options.target).unwrap();
    let (mut program, nodes) = codegen::generate_traced(&graph, &options.target, &layouts).unwrap();
    program.kernels.iter_mut().for_each(|kernel| change(&mut kernel.spec.computes));
    let here: Open<'_> = &|plan, file| open(plan, file, &DeviceOptions::default());
    let mut device = on_device(here, &file, options, program).unwrap();
    let (syms, before) = (rows.syms(), Caches::new());
    let leaf = |op: &Op, ty: &TensorType| leaf_of_model(&file, &before, &rows, op, ty);
    check_kernels(&graph, device.calls_of(&nodes), syms, &leaf).unwrap().nodes
}

/// A device that does other things than it is given to do.
struct Defective {
    device: Box<dyn Device>,
    defect: Defect,
}

#[derive(Clone, Copy)]
enum Defect {
    /// It does nothing.
    Idle,
    /// In this call it also writes this byte of a buffer.
    Strays(usize, BufRef, usize),
}

impl Device for Defective {
    fn kind(&self) -> TargetKind {
        self.device.kind()
    }

    fn isa(&self) -> &str {
        self.device.isa()
    }

    fn submit(&mut self, work: &Submission) -> Result<Ticket, DeviceError> {
        let Defect::Strays(call, buffer, at) = self.defect else { return Ok(Ticket(0)) };
        let ticket = self.device.submit(work)?;
        if !work.calls.contains(&call) {
            return Ok(ticket);
        }
        self.device.wait(ticket)?;
        let mut bytes = vec![0; at + 1];
        self.device.read(0, buffer, 0, &mut bytes)?;
        bytes[at] = 0x5a;
        self.device.write(0, buffer, &bytes)?;
        Ok(ticket)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<(), DeviceError> {
        match self.defect {
            Defect::Idle => Ok(()),
            Defect::Strays(..) => self.device.wait(ticket),
        }
    }

    fn write(&mut self, program: usize, to: BufRef, bytes: &[u8]) -> Result<(), DeviceError> {
        self.device.write(program, to, bytes)
    }

    fn read(&mut self, program: usize, from: BufRef, first: u64, to: &mut [u8]) -> Result<(), DeviceError> {
        self.device.read(program, from, first, to)
    }

    fn copy_rows(&mut self, role: StateRole, from: u64, to: u64, rows: u64) -> Result<(), DeviceError> {
        self.device.copy_rows(role, from, to, rows)
    }

    fn fill_rows(&mut self, role: StateRole, first: u64, rows: u64, byte: u8) -> Result<(), DeviceError> {
        self.device.fill_rows(role, first, rows, byte)
    }

    fn launch_counts(&self) -> Vec<u64> {
        self.device.launch_counts()
    }

    fn timings(&mut self) -> Result<Vec<Timing>, DeviceError> {
        self.device.timings()
    }
}

/// What a kernel leaves unwritten is not taken for its result, though the right one is there from before.
#[test]
fn results_that_are_not_written_are_seen() {
    let text = "graph @g(%x: f32[T,64]) sym T<=2, R<=2 { %y = quant_act %x : q8_act[T,64] return %y }";
    let graph = verify(Graph::parse(text).unwrap()).unwrap();
    let (file, options) = (Arc::new(model::embedded().unwrap()), default_path());
    let (program, nodes) = codegen::generate_traced(&graph, &options.target, &Layouts::default()).unwrap();
    let here: Open<'_> = &|plan, file| open(plan, file, &DeviceOptions::default());
    let mut device = on_device(here, &file, &options, program).unwrap();
    let x: Vec<f32> = (0..128).map(|i| (i as f32).sin()).collect();
    let leaf =
        |_: &Op, _: &TensorType| Ok(Tensor::new(DType::F32, vec![2, 64], bytemuck::cast_slice(&x).to_vec())?);
    let checked = |device: &mut OnDevice| {
        check_kernels(&graph, device.calls_of(&nodes), Syms { t: 2, r: 2 }, &leaf).unwrap()
    };
    let found = checked(&mut device);
    assert!(found.nodes[0].passes());
    let mut idle = OnDevice {
        plan: device.plan,
        device: Box::new(Defective { device: device.device, defect: Defect::Idle }),
    };
    let result = *idle.plan.programs[0].calls[0].args.last().unwrap();
    let mut before = found.results[0].bytes().to_vec();
    before.fill(0);
    idle.device.read(0, result, 0, &mut before).unwrap();
    assert!(before.iter().any(|byte| *byte != 0 && *byte != 0xff), "the result is still there");
    assert!(!checked(&mut idle).nodes[0].passes());
}

/// A kernel that writes beyond the rows of a step, or in a buffer beside its result, is seen though its result is right.
#[test]
fn what_is_written_beside_a_result_is_seen() {
    let text = "graph @g(%x: f32[T,64]) sym T<=2, R<=2 { %y = quant_act %x : q8_act[T,64] %z = dequant %y : f32[T,64] \
                %a = add %x, %z : f32[T,64] %b = mul %a, %x : f32[T,64] return %a, %b, %y, %z }";
    let graph = verify(Graph::parse(text).unwrap()).unwrap();
    let (file, options) = (Arc::new(model::embedded().unwrap()), default_path());
    let at = Syms { t: 1, r: 1 };
    let leaf = |_: &Op, _: &TensorType| Ok(Tensor::new(DType::F32, vec![1, 64], vec![0; 256])?);
    let on = |defect: Option<Defect>| {
        let (program, nodes) =
            codegen::generate_traced(&graph, &options.target, &Layouts::default()).unwrap();
        let here: Open<'_> = &|plan, file| open(plan, file, &DeviceOptions::default());
        let mut on = on_device(here, &file, &options, program).unwrap();
        if let Some(defect) = defect {
            on.device = Box::new(Defective { device: on.device, defect });
        }
        (check_kernels(&graph, on.calls_of(&nodes), at, &leaf).map(|_| ()), on.plan)
    };
    let (checked, plan) = on(None);
    checked.unwrap();
    let program = &plan.programs[0];
    let buffer = |b: u32| &program.buffers[b as usize];
    let end = |b: u32| (buffer(b).offset + buffer(b).ty.bytes(&program.bounds)).next_multiple_of(ALIGN);
    let room = |b: u32| buffer(b).ty.bytes(&program.bounds) as usize;
    let buffers = || 0..program.buffers.len() as u32;
    // A call with what begins where its result ends, and one with what ends where its result begins, none of which they have to do with.
    let (mut behind, mut before) = (None, None);
    for (index, call) in program.calls.iter().enumerate() {
        let Some(BufRef::Arena(own)) = call.args.last() else { continue };
        let other = |b: &u32| !call.args.contains(&BufRef::Arena(*b));
        let next = buffers().filter(other).find(|b| buffer(*b).offset == end(*own));
        behind = behind.or(next.map(|next| (index, *own, next)));
        if let Some(last) = buffers().filter(other).find(|b| end(*b) == buffer(*own).offset) {
            before = Some((index, last, room(last) - 1));
        }
    }
    let (call, own, next) = behind.expect("a result that is not the last");
    let rows = buffer(own).ty.bytes(&at) as usize;
    let before = before.expect("a result that is not the first");
    for (call, buffer, byte) in [(call, own, rows), (call, next, 0), (call, next, 100), before] {
        let found = on(Some(Defect::Strays(call, BufRef::Arena(buffer), byte))).0;
        assert!(matches!(found, Err(CheckError::Strays { .. })), "{buffer}, {byte}: {found:?}");
    }
}

/// Rows that are appended past the end of a cache, or before it, lie in another, and are seen there.
#[test]
fn what_is_written_beside_a_state_is_seen() {
    let (file, options) = (Arc::new(model::embedded().unwrap()), default_path());
    let step = Step { tokens: 2, wanted: 1, greedy: false, kv: options.kv, context: 8, sequences: 1 };
    let plans = std::cell::RefCell::new(vec![]);
    let on = |defect: Option<Defect>| {
        let here: Open<'_> = &|plan, file| {
            plans.borrow_mut().push(Arc::clone(plan));
            let device = open(plan, file, &DeviceOptions::default())?;
            Ok(match defect {
                Some(defect) => Box::new(Defective { device, defect }),
                None => device,
            })
        };
        check_step_on(here, &file, &options, &step, &[0, 33], 0, &mut Caches::new())
    };
    assert!(on(None).unwrap().passes());
    let plan = plans.borrow()[0].clone();
    let (states, bounds) = (&plan.states, &plan.programs[0].bounds);
    let room = |i: usize| states[i].ty.bytes(bounds);
    let follows =
        |i: usize, j: usize| (states[i].offset + room(i)).next_multiple_of(ALIGN) == states[j].offset;
    let (mut behind, mut before) = (None, None);
    for (index, call) in plan.programs[0].calls.iter().enumerate() {
        let args: Vec<_> = plan.kernels[call.kernel as usize].args().zip(&call.args).collect();
        let updates = |i: usize| {
            args.iter().any(|(arg, at)| arg.access == Access::Update && **at == BufRef::State(i as u32))
        };
        let others =
            (0..states.len()).filter(|i| args.iter().all(|(_, at)| **at != BufRef::State(*i as u32)));
        for other in others {
            for own in (0..states.len()).filter(|i| updates(*i)) {
                let place = BufRef::State(other as u32);
                behind = behind.or(follows(own, other).then_some(Defect::Strays(index, place, 0)));
                let last = room(other) as usize - 1;
                before = before.or(follows(other, own).then_some(Defect::Strays(index, place, last)));
            }
        }
    }
    for defect in
        [behind.expect("a cache that is not the last"), before.expect("a cache that is not the first")]
    {
        let found = on(Some(defect));
        assert!(matches!(found, Err(CheckError::Strays { .. })), "{found:?}");
    }
}

fn default_path() -> Options {
    Options { context: Some(8), ..Options::new(Target::cpu()) }
}

#[test]
fn a_step_beyond_its_bounds_is_an_error() {
    let file = Arc::new(model::embedded().unwrap());
    let options = default_path();
    let step = Step { tokens: 2, wanted: 1, greedy: false, kv: options.kv, context: 8, sequences: 1 };
    let checked = |tokens: &[i32]| {
        let device = DeviceOptions::default();
        check_step(&file, &options, &device, &step, tokens, 0, &mut Caches::new())
    };
    assert!(checked(&[0, 33]).unwrap().passes());
    let says = checked(&[0, 33, 280]).unwrap_err().to_string();
    assert_eq!(says, "a step of 3 token rows, 1 of them wanted, is more than 2 and 1");
}

#[test]
fn a_kernel_that_is_not_its_body_is_named() {
    let nodes = checked(&default_path(), |computes| {
        if let Computation::RopeKv(rope_kv) = computes {
            rope_kv.rope.base *= 2.0;
        }
    });
    let outcome = StepCheck { step: "t2".into(), nodes, whole: 0.0 };
    assert!(!outcome.passes());
    assert_eq!(outcome.first_divergence().unwrap().kernel, "rope_kv");
    assert!(outcome.nodes.iter().all(|n| n.passes() == (n.kernel != "rope_kv")), "{:?}", outcome.nodes);
}

/// A part of a block would not be written, and look as if a kernel had.
#[test]
fn what_lies_beside_a_result_is_whole_blocks() {
    for dtype in [DType::F32, DType::F16, DType::I32, DType::Q8Act, DType::Q16Act] {
        assert_eq!(BESIDE % dtype.block_bytes() as u64, 0, "{dtype}");
    }
}

/// Every element type is held to its own bound, whatever the other results of the kernel are.
#[test]
fn results_of_every_type_are_seen() {
    let floats: Vec<f32> = (0..256).map(|i| (i as f32 * 0.7).sin() + 2.0).collect();
    let stored = |dtype, factor: f32| {
        let x: Vec<f32> = floats.iter().map(|x| x * factor).collect();
        let bytes = match dtype {
            DType::F32 => bytemuck::cast_slice(&x).to_vec(),
            DType::F16 => x.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
            DType::Q8Act => {
                let mut bytes = vec![0; x.len() / 32 * DType::Q8Act.block_bytes()];
                crate::gguf::dequant::quantise_q8_act(&x, &mut bytes).unwrap();
                bytes
            }
            DType::Q16Act => {
                let mut bytes = vec![0; x.len() / 32 * DType::Q16Act.block_bytes()];
                crate::gguf::dequant::quantise_q16_act(&x, &mut bytes).unwrap();
                bytes
            }
            // One of all indices is another.
            _ => (0..256i32).flat_map(|i| (i + i32::from(i == 7 && factor != 1.0)).to_le_bytes()).collect(),
        };
        Tensor::new(dtype, vec![256], bytes).unwrap()
    };
    // A little within the bound, and a little beyond it.
    let dtypes = [
        (DType::F32, 1e-5),
        (DType::F16, 5e-4),
        (DType::Q8Act, 5e-3),
        (DType::Q16Act, 5e-5),
        (DType::I32, 0.0),
    ];
    for (dtype, bound) in dtypes {
        let right = stored(dtype, 1.0);
        for (other, _) in dtypes {
            let same = stored(other, 1.0);
            let passes = |factor: f32| {
                let wrong = stored(dtype, factor);
                let found = [(wrong.clone(), &right), (same.clone(), &same)];
                let turned = [(same.clone(), &same), (wrong, &right)];
                let passes = [&found[..], &turned].map(|results| {
                    let (error, tolerance) = furthest(results, 1e-5).unwrap().unwrap();
                    assert!(factor == 1.0 || tolerance == bound, "{dtype} beside {other}: {tolerance}");
                    error <= tolerance
                });
                assert_eq!(passes[0], passes[1], "{dtype} beside {other}");
                passes[0]
            };
            assert!(passes(1.0), "{dtype} beside {other}");
            assert!(
                !passes(1.0 + 2.5 * bound.max(1e-3 * f64::from(bound == 0.0)) as f32),
                "{dtype} beside {other}"
            );
        }
    }
    assert_eq!(furthest(&[], 1e-5).unwrap(), None);
}

/// The rows are right, and their norm, which comes second, is not.
#[test]
fn a_defect_of_a_later_result_is_found() {
    let nodes = checked(&default_path(), |computes| {
        if let Computation::Norm(norm) = computes
            && matches!(norm.source, NormSource::Embedding { .. })
        {
            assert!(norm.rows_out.is_some() && norm.rows_out < norm.quant_out, "the rows come first");
            norm.eps = 1e6;
        }
    });
    let (wrong, right): (Vec<_>, Vec<_>) = nodes.into_iter().partition(|n| n.kernel == "dequant_rmsnorm");
    assert!(right.iter().all(NodeCheck::passes), "{right:?}");
    assert!(!wrong.is_empty() && wrong.iter().all(|n| !n.passes()), "{wrong:?}");
}

#[test]
fn the_whole_counts_too() {
    let of = |whole| StepCheck { step: "t2".into(), nodes: vec![], whole }.passes();
    assert!(of(0.0) && of(9e-6));
    assert!(!of(3e-5) && !of(1.0) && !of(f64::NAN));

    let tensors =
        |rows: [f32; 2]| rows.map(|x| Tensor::new(DType::F32, vec![1], x.to_le_bytes().to_vec()).unwrap());
    let far = |found| largest_distance(&tensors(found), &tensors([4.0, 2.0])).unwrap();
    assert_eq!([far([4.0, 2.0]), far([5.0, 2.0]), far([4.0, 3.0]), far([5.0, 3.0])], [0.0, 0.25, 0.5, 0.5]);
    assert!(far([f32::NAN, 3.0]).is_nan() && far([5.0, f32::NAN]).is_nan());
}

/// Of kernels with results of one type alone, those with a defect of a few tolerances fail, and no others do.
#[test]
fn a_small_defect_is_found() {
    let scale = |computes: &mut Computation| match computes {
        Computation::Attention(a) => a.scale *= 1.05,
        Computation::Op(Op::Scores { scale }) => *scale *= 1.0001,
        _ => {}
    };
    let exact = default_path().exact();
    let unfused = Options { pipeline: exact.pipeline.clone().without_fusions(), ..exact };
    for (kernel, options) in [("attention", default_path()), ("scores", unfused)] {
        let nodes = checked(&options, scale);
        let (wrong, right): (Vec<_>, Vec<_>) = nodes.into_iter().partition(|n| n.kernel == kernel);
        assert!(right.iter().all(NodeCheck::passes), "{kernel}: {right:?}");
        assert_eq!(wrong.len(), 4, "{kernel}");
        for n in wrong {
            let times = n.error / n.tolerance;
            assert!(!n.passes() && times < 60.0, "{kernel}: {times} tolerances");
        }
    }
}
