//! What graphs and programs look like as pictures.

mod support;

use sinter::compile::{Options, Purpose};
use sinter::explain::{chains, flip};
use sinter::ir::Graph;
use sinter::lower::{self, Config};
use sinter::passes::Pipeline;
use sinter::show::dot::dot;
use sinter::show::{Diagram, Page, Parts, View};
use sinter::target::{Measured, MeasuredTime, Target};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::synthetic::{description, shape};
use support::{command, plan_of_description};

/// A model of this many layers' worth of description, as it is lowered and as it is fused.
fn graphs(name: &str, target: &Target) -> [Graph; 2] {
    let gguf = description(name);
    let config = Config::from_gguf(&gguf).unwrap();
    let options = Options::new(target.clone());
    let step = Purpose::Generate.steps(&config, &options)[0];
    let lowered = lower::lower(&gguf, &config, &step).unwrap();
    let mut fused = lowered.clone();
    let mut pipeline = Pipeline::standard(false);
    pipeline.verify_each = false;
    pipeline.run(&mut fused, target).unwrap();
    [lowered, fused]
}

#[test]
fn the_dot_of_a_small_model() {
    let [_, fused] = graphs("tiny-llama", &Target::test_cpu());
    insta::assert_snapshot!("dot", dot(&Diagram::of_graph(&fused, &Target::test_cpu(), false)));
}

/// Whatever is drawn of 32 layers, Graphviz takes it in seconds; a node whose edges go to every layer would cost it minutes.
#[test]
fn graphviz_takes_32_layers() {
    let target = Target::cpu();
    let graphs = graphs("llama-3.1-8b", &target);
    assert_eq!(shape("llama-3.1-8b").layers, 32);
    for (graph, unfold) in graphs.iter().flat_map(|graph| [(graph, false), (graph, true)]) {
        let diagram = Diagram::of_graph(graph, &target, unfold);
        let text = dot(&diagram);
        assert_eq!(
            text.matches("subgraph").count() == 32,
            unfold,
            "{} clusters",
            text.matches("subgraph").count()
        );
        // No value is taken from further up than two layers.
        let two_layers = diagram.nodes.len() / 16;
        for (at, node) in diagram.nodes.iter().enumerate() {
            assert!(node.operands.iter().all(|operand| at - operand.from <= two_layers), "{}", node.name);
        }
        let Some(time) = graphviz(&text) else { return };
        println!("{} nodes in {time:?}", text.matches("[label").count());
        assert!(time < Duration::from_secs(5), "{time:?}");
    }
}

/// How long `dot` takes; none where it is not installed.
fn graphviz(text: &str) -> Option<Duration> {
    let start = Instant::now();
    let mut command = Command::new("dot");
    let Ok(mut child) = command.arg("-Tsvg").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
        println!("skipped: there is no dot here");
        return None;
    };
    let mut stdin = child.stdin.take().unwrap();
    let text = text.to_string();
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success() && output.stdout.starts_with(b"<?xml"));
    Some(start.elapsed())
}

/// The views of a model's steps on some targets, as `dump --format html` makes them.
fn page(name: &str, targets: &[Target]) -> Page {
    let gguf = description(name);
    let config = Config::from_gguf(&gguf).unwrap();
    let mut views = vec![];
    for target in targets {
        let mut options = Options::new(target.clone());
        options.pipeline.verify_each = false;
        let plan = plan_of_description(&gguf, &options, Purpose::Generate);
        let steps = Purpose::Generate.steps(&config, &options);
        for (step, at) in [("decode", 0), ("prefill", steps.len() - 1)] {
            let lowered = lower::lower(&gguf, &config, &steps[at]).unwrap();
            let parts = Parts {
                model: name,
                step,
                lowered: &lowered,
                pipeline: &options.pipeline,
                target,
                context: options.context_of(&config),
                sequences: options.sequences,
                plan: Some((&plan, &plan.programs[at])),
            };
            views.push(View::new(&parts).unwrap());
        }
    }
    Page::new(name, views)
}

/// The page of a 32-layer model is made and opened in no time, and needs nothing but itself.
#[test]
fn the_page_of_32_layers_is_small() {
    let start = Instant::now();
    let page = page("llama-3.1-8b", &[Target::cpu()]);
    let html = page.to_html().unwrap();
    let time = start.elapsed();
    println!("{} bytes in {time:?}", html.len());
    assert!(html.len() < 3_000_000, "{} bytes", html.len());
    assert!(cfg!(debug_assertions) || time < Duration::from_secs(10), "{time:?}");
    for outside in ["http://", "https://", "src=", "@import", "url(//"] {
        let rest = html.replace("http://www.w3.org/2000/svg", "");
        assert!(!rest.contains(outside), "{outside}");
    }
    assert!(!html.contains("{{"), "every place is filled");
}

/// What a view says of a kernel is what the graph, the cost model and the passes say.
#[test]
fn a_view_accounts_for_every_primitive_and_rewrite() {
    let target = Target::test_cpu();
    let [_, fused] = graphs("tiny-llama", &target);
    let page = page("tiny-llama", &[target]);
    let view = &page.views[0];
    let us: f64 = view.kernels.iter().map(|kernel| kernel.us).sum();
    assert!((us - view.after.us).abs() < 1e-6 * us, "{us} of {}", view.after.us);
    let us: f64 = view.primitives.iter().map(|primitive| primitive.us).sum();
    assert!((us - view.before.us).abs() < 1e-6 * us, "{us} of {}", view.before.us);
    assert!(fused.ids().iter().filter(|id| fused.op(**id).kernel().is_some()).count() > 10);
    // Every primitive is in one kernel, and every kernel is in one group.
    let mut kernels = vec![0; view.kernels.len()];
    for (at, primitive) in view.primitives.iter().enumerate() {
        let kernel = primitive.kernel.unwrap_or_else(|| panic!("{} went nowhere", primitive.name));
        assert!(view.kernels[kernel].primitives.contains(&at));
    }
    for member in view.groups.iter().flat_map(|group| &group.members) {
        member.kernels.iter().for_each(|kernel| kernels[*kernel] += 1);
    }
    assert!(kernels.iter().all(|times| *times == 1), "{kernels:?}");
    // Scores are written by primitives alone; the residual still is.
    let result = |name: &str| &view.primitives.iter().find(|p| p.name.starts_with(name)).unwrap().results[0];
    assert!(result("scores").2.is_some(), "scores are still written");
    assert!(result("add").2.is_none(), "the residual is no longer written");
    // A rewrite for each that the report counts, and a call for each kernel.
    let memory = view.memory.as_ref().unwrap();
    assert_eq!(memory.calls.len(), view.kernels.len());
    assert!(memory.calls.iter().enumerate().all(|(at, call)| call.kernel == Some(at)));
    assert!(memory.buffers.iter().all(|held| held.offset + held.bytes <= memory.arena_bytes));
    assert!(view.steps.iter().filter(|step| step.gain.is_some()).count() > 20);
    // Each is somewhere in the picture, also those before any fusion, but where what came of it is gone since.
    let nowhere = |step: &&sinter::show::Step| step.primitives.is_empty() && step.pass != "cleanup";
    assert_eq!(view.steps.iter().filter(nowhere).count(), 0);
    assert!(view.steps.iter().any(|step| step.pass == "quantise_acts"));
}

/// The views of a page that the command wrote.
fn views(html: &str) -> Vec<serde_json::Value> {
    let data = html.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let json: serde_json::Value = serde_json::from_str(data).unwrap();
    json["views"].as_array().unwrap().clone()
}

/// The heading of the page and of the picture has the figures and the words of `explain`.
#[test]
fn a_heading_says_what_explain_says() {
    for target in ["cpu", "gfx1100", "sm_90"] {
        for step in ["decode", "prefill"] {
            let of = ["--step", step, "--target", target];
            let explained = command::stdout(&[&["explain"], &of[..]].concat());
            let html = command::stdout(&[&["dump", "--format", "html"], &of[..]].concat());
            let drawn = command::stdout(&[&["dump", "--format", "svg"], &of[..]].concat());
            let view = &views(&html)[0];
            let about: Vec<&str> =
                view["about"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
            let [step, costs, rates @ ..] = &about[..] else { panic!("{about:?}") };
            let program = view["program"].as_str().unwrap();
            let figures = costs.split(" (").next().unwrap().replace('→', "->");
            assert!(
                explained.contains(&format!("\n{program}: {step}\n{figures}\n")),
                "{about:?}\n{explained}"
            );
            let (drawn_in, lowered) = (count_of(&view["before"]), count_of(&view["lowered"]));
            assert!(drawn_in > lowered);
            let put_in = format!("and {} that quantise_acts put in: ", drawn_in - lowered);
            let said = costs.split_once(" (").and_then(|(_, rest)| rest.split_once(", drawn as")).unwrap().0;
            assert!(
                said.starts_with(&put_in) && explained.contains(&format!(", {said};")),
                "{said}\n{explained}"
            );
            // Of the roofline, which has a dot for each kernel of a layer that computes, none of which is above the highest roof.
            let kernels = view["groups"]
                .as_array()
                .unwrap()
                .iter()
                .flat_map(|g| g["members"][0]["kernels"].as_array().unwrap());
            let computes = |at: &&serde_json::Value| {
                view["kernels"][at.as_u64().unwrap() as usize]["operations"].as_u64() > Some(0)
            };
            assert_eq!(
                drawn.matches("<circle ").count(),
                kernels.filter(computes).count(),
                "{target} {step}"
            );
            // The last point of the highest roof is its height.
            let ends = drawn.split("<path class=\"roof\" d=\"M").skip(1);
            let heights = ends.map(|path| {
                path.split('"').next().unwrap().rsplit(' ').next().unwrap().parse::<f64>().unwrap()
            });
            let ceiling = heights.fold(f64::INFINITY, f64::min);
            for dot in drawn.split("<circle ").skip(1) {
                assert!(attribute(dot, "cy=\"") >= ceiling, "{dot}");
            }
            let said = explained.split("\n\n").next().unwrap().lines().nth(1);
            assert_eq!(
                (rates.first().copied(), rates.len()),
                (said, usize::from(target != "sm_90")),
                "{target}"
            );
            // In lines that end within the picture: 7.2 pixels a letter, and a margin.
            let width: f64 = attribute(&drawn, " width=\"");
            let texts = |class: &str| -> Vec<&str> {
                let begin = format!("<text class=\"{class}\" x=\"28\"");
                let of = drawn.split(begin.as_str()).skip(1);
                of.map(|rest| rest.split_once('>').unwrap().1.split("</text>").next().unwrap()).collect()
            };
            let lines = texts("line");
            assert_eq!(lines.join(" "), about.join(" "), "{drawn}");
            assert!(
                lines.iter().all(|line| 28.0 + 7.2 * line.chars().count() as f64 <= width - 14.0),
                "{lines:?}"
            );
            // Above the graph, time by kernel, the roofline, the memory of the plan and what was not fused.
            let charts: Vec<&str> = drawn.split("<g class=\"chart\"").skip(1).collect();
            assert_eq!(charts.len(), 4, "{drawn}");
            let kernels = view["after"]["launches"].as_object().unwrap();
            assert!(kernels.keys().all(|kernel| charts[0].contains(&format!(">{kernel} "))), "{}", charts[0]);
            let heads = ["roofline: ", "memory: arena ", "not fused: "];
            assert!(charts[1..].iter().zip(heads).all(|(chart, head)| chart.contains(head)), "{charts:?}");
        }
    }
}

/// The number in an attribute.
fn attribute(svg: &str, of: &str) -> f64 {
    svg.split_once(of).unwrap().1.split('"').next().unwrap().parse().unwrap()
}

/// Buffers lie in the plot, and calls on the lanes of their streams.
#[test]
fn the_picture_of_a_plan_has_its_memory_and_streams() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("two.json");
    let two = Target { streams: 2, name: "two-streams".into(), ..Target::test_cpu() };
    std::fs::write(&file, serde_json::to_string(&two).unwrap()).unwrap();
    let target = file.to_str().unwrap();
    let plan = ["dump", "--stage", "plan", "--target", target];
    let json: serde_json::Value =
        serde_json::from_str(&command::stdout(&[&plan[..], &["--format", "json"]].concat())).unwrap();
    let program = &json["programs"][0];
    let drawn = command::stdout(&[&plan[..], &["--format", "svg"]].concat());
    let chart = drawn.split("<g class=\"chart\"").nth(1).unwrap().split("</g>").next().unwrap();
    let count = |what: &str| chart.matches(what).count();
    assert_eq!(count("<rect class=\"call "), program["calls"].as_array().unwrap().len());
    assert_eq!(count("<rect class=\"held "), program["buffers"].as_array().unwrap().len());
    assert!(chart.contains(">stream 0<") && chart.contains(">stream 1<"), "{chart}");
    let (width, calls) = (attribute(&drawn, " width=\""), program["calls"].as_array().unwrap().len());
    assert!(chart.contains(&format!("; {calls} calls on 2 streams")), "{chart}");
    for line in chart.split("<text class=\"line\"").skip(1) {
        let text = line.split_once('>').unwrap().1.split("</text>").next().unwrap();
        assert!(28.0 + 6.7 * text.chars().count() as f64 <= width - 14.0, "{text}");
    }
    for rect in chart.split("<rect class=\"held ").skip(1) {
        let [x, y, wide, high] = [" x=\"", " y=\"", " width=\"", " height=\""].map(|of| attribute(rect, of));
        assert!(x >= 71.9 && x + wide <= width - 56.0 && wide > 0.0, "{rect}");
        assert!(y >= 23.0 && y + high <= 233.0 && high > 0.0, "{rect}");
    }
}

fn count_of(totals: &serde_json::Value) -> u64 {
    totals["launches"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum()
}

/// Of each kernel the page has the decisions that `explain --kernel` tells, what would turn them over, and what was measured.
#[test]
fn a_kernel_has_its_decisions_and_its_measured_time() {
    let gguf = description("tiny-llama");
    let config = Config::from_gguf(&gguf).unwrap();
    let plain = Options::new(Target::test_wave32());
    let step = Purpose::Generate.steps(&config, &plain)[0];
    let (_, report) = sinter::compile::fuse(&gguf, &plain, &step).unwrap();
    // All kernels but the first were measured.
    let times = report.kernels[1..].iter().map(|kernel| MeasuredTime {
        step: report.graph.clone(),
        at: kernel.at.clone(),
        us: 3.0 * kernel.us,
    });
    let measured = Some(Measured {
        device: "some card".into(),
        context: 7,
        times: times.collect(),
        ..Measured::default()
    });
    let target = Target { measured, ..plain.target.clone() };
    let lowered = lower::lower(&gguf, &config, &step).unwrap();
    let parts = Parts {
        model: "m",
        step: "decode",
        lowered: &lowered,
        pipeline: &plain.pipeline,
        target: &target,
        context: 7,
        sequences: 2,
        plan: None,
    };
    let view = View::new(&parts).unwrap();
    assert!(
        view.about[0].ends_with("caches filled to 7 positions of each of 2 sequences"),
        "{:?}",
        view.about
    );
    assert!(view.about[2].starts_with("rates were measured on some card"), "{:?}", view.about);
    // What was timed at another depth says nothing of this one.
    let deeper = View::new(&Parts { context: 8, ..parts }).unwrap();
    assert!(deeper.kernels.iter().all(|kernel| kernel.measured_us.is_none()));
    let kernels: Vec<_> = view.kernels.iter().filter(|kernel| kernel.launches > 0).collect();
    assert_eq!(kernels.len(), report.kernels.len());
    let chains = chains(&report);
    let (mut fired, mut rejected) = (0, 0);
    for (i, (kernel, of)) in kernels.iter().zip(&report.kernels).enumerate() {
        assert_eq!((&kernel.name, kernel.us), (&of.kernel, of.us));
        assert_eq!(kernel.measured_us, (i > 0).then_some(3.0 * of.us));
        let mut told: Vec<String> =
            kernel.steps.iter().map(|n| view.turns[view.steps[n - 1].turn].clone()).collect();
        fired += told.len();
        rejected += kernel.rejected.len();
        told.extend(kernel.rejected.iter().map(|i| view.rejected[*i].turns.clone()));
        for decision in chains.get(&of.number).into_iter().flatten() {
            assert!(told.contains(&flip(decision, &target)), "{decision}: {told:?}");
        }
        for n in &kernel.steps {
            let step = &view.steps[n - 1];
            assert!(chains[&of.number].iter().any(|d| d.pass == step.pass && d.at == step.at), "{}", step.at);
        }
    }
    assert!(fired > report.kernels.len() && rejected > 0, "{fired} {rejected}");
}

/// What takes plans says so, and what takes one target does not speak of several.
#[test]
fn help_says_what_commands_take() {
    for name in
        ["run", "compile", "dump", "explain", "check", "logits", "perplexity", "bench", "profile", "tune"]
    {
        let help = command::stdout(&[name, "--help"]);
        assert_eq!(help.contains("any number between commas"), ["compile", "dump"].contains(&name), "{help}");
        let takes_plans = ["run", "dump", "explain", "profile"].contains(&name);
        assert_eq!(
            help.contains("[MODEL|PLAN]") && help.contains("or compiled plan;"),
            takes_plans,
            "{help}"
        );
    }
}

/// Names come from files: none ends the script or the page, or becomes markup.
#[test]
fn names_in_a_page_are_text() {
    let target = Target::test_cpu();
    let nasty = "</script><b>{{style}}&\"<!--";
    let text = format!(
        "graph @g(%x: f32[T,4]) sym T<=2 {{\n %w = weight {nasty:?} : f32[4]\n\
         %0 = rms_norm %x, %w {{eps=0.1}} : f32[T,4]\n return %0 }}"
    );
    let graph = Graph::parse(&text).unwrap();
    let pipeline = Pipeline::standard(true);
    let parts = Parts {
        model: nasty,
        step: "decode",
        lowered: &graph,
        pipeline: &pipeline,
        target: &target,
        context: 4,
        sequences: 1,
        plan: None,
    };
    let view = View::new(&parts).unwrap();
    let drawn = view.to_svg();
    assert!(drawn.contains("&lt;/script&gt;") && !drawn.contains("<b>"), "{drawn}");
    let html = Page::new(nasty, vec![view]).to_html().unwrap();
    let data = html.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let json: serde_json::Value = serde_json::from_str(data).unwrap();
    assert_eq!(json["model"], nasty);
    assert_eq!(html.matches("</script>").count(), 2);
    assert!(!html.contains("<b>{{"), "a name became markup");
}

/// What a browser makes of an address; none if it does not within a minute.
fn dom(address: &str) -> Option<String> {
    let profile = tempfile::tempdir().unwrap();
    let mut command = Command::new("chromium");
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]);
    command.arg(format!("--user-data-dir={}", profile.path().display())).arg(address);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let mut stdout = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![];
        stdout.read_to_end(&mut bytes).map(|_| bytes)
    });
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    String::from_utf8(reader.join().unwrap().unwrap()).ok()
}

/// Whether there is a browser that opens pages here, which takes more than a command of its name.
fn is_there_a_browser() -> bool {
    let opens = dom("data:text/html,<p>opened</p>").is_some_and(|dom| dom.contains("<p>opened</p>"));
    if !opens {
        println!("skipped: there is no chromium here that opens a page");
    }
    opens
}

/// What a browser makes of the page at an address.
fn browse(page: &Path, address: &str) -> String {
    let dom = dom(&format!("file://{}#{address}", page.display()));
    let dom = dom.unwrap_or_else(|| panic!("the browser came to no end at {address}"));
    // The styles, the data and the program are in it too; what is drawn stands between them.
    let body = dom.split("<body").nth(1).unwrap_or_default();
    let drawn = body.split("<script").next().unwrap_or_default().to_string();
    assert!(drawn.contains("data-ready"), "the page came to no end at {address}");
    drawn
}

#[test]
fn a_browser_opens_folds_searches_steps_and_switches() {
    if !is_there_a_browser() {
        return;
    }
    // On two streams, so that there are lanes.
    let two = Target {
        streams: 2,
        name: "two-streams".into(),
        bandwidth_gbs: 62.36739090255697,
        ..Target::test_cpu()
    };
    let page = page("qwen2.5-0.5b", &[Target::test_cpu(), two]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("page.html");
    std::fs::write(&path, page.to_html().unwrap()).unwrap();
    let plain = browse(&path, "");
    let count = |dom: &str, what: &str| dom.matches(what).count();

    // It opens: a bar, a legend, folded layers, both charts, what was not fused.
    assert!(plain.contains("decode · test-cpu") && plain.contains("prefill · two-streams"));
    assert!(plain.contains("blk.1–22 × 22"), "folded layers");
    let groups = count(&plain, "class=\"group\"");
    assert_eq!(groups, page.views[0].groups.len());
    assert!(count(&plain, "class=\"dot ") > 5 && count(&plain, "class=\"held ") > 50);
    assert!(plain.contains("the logits themselves are returned"));
    assert!(count(&plain, "edge gone") > 20, "intermediate values are struck out");

    // It unfolds, and folds again.
    let open = page.views[0].groups.iter().position(|group| group.members.len() == 22).unwrap();
    let unfolded = browse(&path, &format!("unfold={open}"));
    assert_eq!(count(&unfolded, "class=\"group\""), groups + 21);
    assert!(unfolded.contains(">blk.17<") && !plain.contains(">blk.17<"));

    // It searches.
    let found = browse(&path, "search=attn_output");
    // The matmul too, which reads the weight through what dequantises it.
    assert!(found.contains("24 kernels, 48 primitives"), "{found}");
    assert!(count(&found, " hit\"") > 0 && count(&found, " dim\"") > count(&found, " hit\""));

    // It steps: nothing is fused at first; at the end everything is.
    let view = &page.views[0];
    let first = view.steps.iter().position(|step| step.gain.is_some()).unwrap();
    let at = |step: usize| browse(&path, &format!("step={step}"));
    let (none, one, all) = (at(first), at(first + 1), at(view.steps.len()));
    assert_eq!((count(&none, "edge gone"), count(&all, "edge gone")), (0, count(&plain, "edge gone")));
    assert!(count(&one, "edge gone") > 0 && count(&one, "edge gone") < 5);
    assert!(count(&none, "unmade") > 10 && count(&all, "unmade") == 0);
    assert!(one.contains(&format!("rewrite {} of {}", first + 1, view.steps.len())));
    assert!(one.contains("<s>"), "what the step no longer writes is struck out");

    // It switches step and target, and shows the lanes of streams.
    let prefill = browse(&path, "view=1");
    assert!(prefill.contains("test-cpu, t512: a step of T=512 tokens"));
    let other = browse(&path, "view=2");
    assert!(other.contains("two-streams, t1: a step of T=1 tokens") && other.contains("on 2 streams"));
    assert!(other.contains("roofs: 62.4 GB/s, "), "{other}");

    // And tells what a kernel is made of.
    let kernel = view.kernels.iter().position(|kernel| kernel.name == "attention").unwrap();
    let chosen = browse(&path, &format!("kernel={kernel}"));
    for words in [
        "stands for",
        "softmax",
        "how it was made",
        "before: 10 primitives",
        "limited by",
        "1 launch<",
        "runner-up: unfused, ",
        "would turn over with: --deny attention; ",
    ] {
        assert!(chosen.contains(words), "{words}");
    }
    // What a click opens is not hidden by the words at the pointer.
    let click = "<script>const at = document.querySelector('#groups [data-kernel]');\
                 at.dispatchEvent(new MouseEvent('mousemove', { bubbles: true }));\
                 document.body.dataset.before = $('tip').hidden;\
                 at.dispatchEvent(new MouseEvent('click', { bubbles: true }));\
                 document.body.dataset.after = $('tip').hidden;</script></body>";
    let clicked = dir.path().join("clicked.html");
    std::fs::write(&clicked, page.to_html().unwrap().replace("</body>", click)).unwrap();
    let clicked = browse(&clicked, "");
    assert!(clicked.contains("data-before=\"false\"") && clicked.contains("data-after=\"true\""));
    // What an address says that is not there is passed over.
    browse(&path, "view=99&step=-4&unfold=x,77&kernel=1e9&primitive=z");
}
