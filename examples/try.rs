use sinter::{compile::*, gguf::GgufFile, target::Target, passes::*};
fn main() {
    let path = std::env::args().nth(1).unwrap();
    let f = GgufFile::open(path).unwrap();
    for target in [Target::cpu(), Target::test_wave32()] {
    for exact in [false, true] {
        let mut o = Options::new(target.clone());
        if exact { o = o.exact(); }
        let cfg = sinter::lower::Config::from_gguf(f.gguf()).unwrap();
        for step in Purpose::Generate.steps(&cfg, &o).into_iter().chain(Purpose::Score.steps(&cfg,&o)) {
            let t = std::time::Instant::now();
            let g = sinter::lower::lower(f.gguf(), &cfg, &step).unwrap();
            let t1 = t.elapsed();
            let t = std::time::Instant::now();
            let mut g2 = g.clone();
            let r = o.pipeline.run(&mut g2, &o.target).unwrap();
            println!("{} exact={exact} {} lower {:?} passes {:?} nodes {} -> {}", target.name, step.name, t1, t.elapsed(), g.len(), g2.len());
            println!("   fired {:?}", r.fired());
            println!("   before {} {:.1}us after {} {:.1}us {:?}", r.before.count(), r.before.us, r.after.count(), r.after.us, r.after.launches);
            let mut rej: std::collections::BTreeMap<String,usize> = Default::default();
            for d in &r.decisions { if let sinter::ir::Outcome::Rejected{why} = &d.outcome { *rej.entry(format!("{} {} {}", d.pass, why.name(), d.at.split(' ').next().unwrap())).or_default() += 1; } }
            println!("   rejected {rej:?}");
        }
        if target.name == "cpu" {
            for c in compile(f.gguf(), &o, Purpose::Generate).unwrap() { println!("   program {} kernels {} launches {} bufs {}", c.program.name, c.program.kernels.len(), c.program.launches.len(), c.program.buffers.len()); }
        }
    }}
}
