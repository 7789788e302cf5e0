//! `sinter dump --all DIR`: every stage after every pass, with an index.

use super::super::args::StepName;
use super::super::say;
use super::{Args, page};
use clap::ValueEnum;
use sinter::compile;
use sinter::ir::Graph;
use sinter::lower::{self, Config};
use sinter::passes::AfterPass;
use sinter::runtime::Size;
use sinter::show::dot::dot;
use sinter::show::{Diagram, Page, svg, svg_of_plan};
use std::fs;
use std::path::{Component, Path, PathBuf};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The listing, by whose first line a folder is known for one that this command made.
const LISTING: &str = "index.txt";
const MADE_BY: &str = "made by sinter dump --all";

/// A stage: what it is called, its files by their endings, and what there is to say about it.
struct Stage {
    name: String,
    files: Vec<(&'static str, String)>,
    about: String,
}

pub fn run(dir: &Path, args: &Args) -> super::super::Outcome {
    let file = args.model.open()?;
    let gguf = file.gguf();
    let options = args.compile.options(args.greedy)?;
    let config = Config::from_gguf(gguf)?;
    let steps = args.step.map_or_else(|| vec![StepName::Decode, StepName::Prefill], |step| vec![step]);
    let mut folder = Folder::open(dir)?;
    let mut views = vec![];
    for step in steps {
        let words = step.to_possible_value();
        let step_name = words.as_ref().map_or("step", |words| words.get_name()).to_string();
        let drawn = |name: &str, g: &Graph| {
            let diagram = Diagram::of_graph(g, &options.target, args.unfold);
            Stage {
                name: name.into(),
                files: vec![("sir", format!("{g}\n")), ("dot", dot(&diagram)), ("svg", svg(&diagram))],
                about: format!("{} nodes", diagram.nodes.len()),
            }
        };
        let lowered = lower::lower(gguf, &config, &step.step(&config, &options)?)?;
        let mut stages = vec![drawn("lowered", &lowered)];
        let mut last = lowered.to_string();
        let mut keep = AfterPass(|pass, g: &Graph| {
            let mut stage = drawn(pass, g);
            let now = g.to_string();
            if now == last {
                stage.about += ", as before";
            }
            last = now;
            stages.push(stage);
        });
        options.pipeline.run_observed(&mut lowered.clone(), &options.target, &mut keep)?;
        let plan = page::plan(&file, args, &options, step)?;
        if let Some(plan) = &plan {
            let programs = compile::compile(gguf, &options, step.purpose())?;
            let index = step.index(programs.len());
            if let Some(compiled) = programs.get(index) {
                let diagram = Diagram::of_program(&compiled.program, args.unfold);
                stages.push(Stage {
                    name: "kernels".into(),
                    files: vec![
                        ("txt", compiled.program.to_string()),
                        ("dot", dot(&diagram)),
                        ("svg", svg(&diagram)),
                    ],
                    about: format!(
                        "{} calls of {} kernels",
                        diagram.nodes.len(),
                        compiled.program.kernels.len()
                    ),
                });
            }
            if let Some(program) = plan.programs.get(index) {
                stages.push(Stage {
                    name: "plan".into(),
                    files: vec![
                        ("txt", plan.to_string()),
                        ("dot", dot(&Diagram::of_plan(plan, program, args.unfold))),
                        ("svg", svg_of_plan(plan, program, args.unfold)),
                    ],
                    about: format!("arena of {}", Size(program.arena_bytes)),
                });
            }
        }
        for (number, stage) in stages.into_iter().enumerate() {
            folder.write(&step_name, number, stage)?;
        }
        views.push(page::view(&file, &config, &lowered, step, &options, plan.as_ref())?);
    }
    let name = page::name_of(&file)?;
    let html = Page::new(name.clone(), views).to_html()?;
    folder.finish(&format!("{name} on {}", options.target.name), &html)
}

/// The folder as it is being filled.
struct Folder {
    dir: PathBuf,
    /// Step, stage, its files, and what there is to say about it.
    entries: Vec<(String, String, Vec<String>, String)>,
}

impl Folder {
    /// An empty or a new folder, or one that this command made, which is emptied of what it wrote.
    fn open(dir: &Path) -> Result<Folder, Error> {
        let name = dir.display();
        let cannot = |e: std::io::Error| format!("cannot write to {name}: {e}");
        fs::create_dir_all(dir).map_err(cannot)?;
        let is_empty = fs::read_dir(dir).map_err(cannot)?.next().is_none();
        match fs::read_to_string(dir.join(LISTING)) {
            Ok(listing) if listing.lines().next().is_some_and(|line| line.starts_with(MADE_BY)) => {
                for file in listing.lines().skip(1).filter_map(|line| line.split_whitespace().next()) {
                    let path = Path::new(file);
                    if path.components().all(|part| matches!(part, Component::Normal(_))) {
                        // What is gone already need not go.
                        _ = fs::remove_file(dir.join(path));
                        // A folder that is empty now goes too, but for the one itself.
                        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                        _ = parent.map(|parent| fs::remove_dir(dir.join(parent)));
                    }
                }
            }
            _ if is_empty => {}
            _ => {
                return Err(
                    format!("{name} is not empty, and not made by dump --all; name another folder").into()
                );
            }
        }
        let folder = Folder { dir: dir.into(), entries: vec![] };
        // So that what is left of a run that failed is known too.
        folder.put(LISTING, &format!("{MADE_BY}\n"))?;
        Ok(folder)
    }

    fn put(&self, file: &str, text: &str) -> Result<(), Error> {
        let path = self.dir.join(file);
        let made = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&path, text));
        Ok(made.map_err(|e| format!("cannot write {}: {e}", path.display()))?)
    }

    fn write(&mut self, step: &str, number: usize, stage: Stage) -> Result<(), Error> {
        let mut files = vec![];
        for (ending, text) in stage.files {
            let file = format!("{step}/{number:02}-{}.{ending}", stage.name);
            self.put(&file, &text)?;
            files.push(file);
        }
        self.entries.push((step.into(), format!("{number:02} {}", stage.name), files, stage.about));
        Ok(())
    }

    /// Writes the page and the indices.
    fn finish(self, title: &str, page: &str) -> super::super::Outcome {
        self.put("page.html", page)?;
        let mut list =
            format!("{MADE_BY} (sinter {}): {}\n", env!("CARGO_PKG_VERSION"), title.escape_debug());
        list += "index.html      this list for a browser\npage.html       all of it as one page\n";
        let escaped = title.replace('&', "&amp;").replace('<', "&lt;");
        let mut html = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{escaped}</title>\n\
             <style>:root{{color-scheme:light dark}}body{{font:14px/1.5 system-ui,sans-serif;margin:24px}}\
             td{{padding:2px 14px 2px 0}}</style></head>\n<body><h1>{escaped}</h1>\n\
             <p><a href=\"page.html\">all of it as one page</a></p>\n"
        );
        let mut step = "";
        for (of, name, files, about) in &self.entries {
            if of != step {
                html += if step.is_empty() { "" } else { "</table>\n" };
                html += &format!("<h2>{of}</h2>\n<table>\n");
                step = of;
            }
            let links = files.iter().map(|file| {
                format!("<a href=\"{file}\">{}</a>", file.rsplit('.').next().unwrap_or_default())
            });
            html += &format!("<tr><td>{name}</td><td>{}</td>", links.collect::<Vec<_>>().join(" "));
            html += &format!("<td>{about}</td></tr>\n");
            for file in files {
                list += &format!("{file:32} {about}\n");
            }
        }
        html += "</table></body></html>\n";
        self.put("index.html", &html)?;
        self.put(LISTING, &list)?;
        let count = self.entries.iter().map(|entry| entry.2.len()).sum::<usize>();
        say!("{}: {count} files of {} stages; begin at index.html", self.dir.display(), self.entries.len());
        Ok(())
    }
}
