//! The report as a whole: golden files of its text, and an HTML page that stays valid with real, empty and
//! malicious data.

use crate::common::skip::all;

use std::io::Write as _;
use std::process::{Command, Stdio};

use xtask::report::{
    BuildReport, CacheUse, PathSize, ReportDisk, ReportKind, ReportOutput, ReportPackage,
    ReportProduct, ReportRegion, ReportRegionKind, ReportReplacement, ReportRoot, ReportSigner,
    ReportStage, ReportTableKind, ReportWheel, SCHEMA, TerminalStyle, render_html, render_terminal,
};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/report");

fn realistic() -> BuildReport {
    let text = std::fs::read_to_string(format!("{FIXTURES}/realistic.json")).unwrap();
    BuildReport::from_json(&text).unwrap()
}

fn empty() -> BuildReport {
    BuildReport {
        schema: SCHEMA,
        product: ReportProduct {
            name: "p".into(),
            title: "P".into(),
            version: "0".into(),
            kind: ReportKind::Release,
        },
        board: "b".into(),
        engine: "e".into(),
        suite: None,
        commit: None,
        epoch: 0,
        started_in: CacheUse::Clean,
        seconds: 0.0,
        stages: vec![],
        outputs: vec![],
        signed_by: None,
        disk: None,
        root: None,
        packages: vec![],
        wheels: vec![],
        largest_files: vec![],
        directories: vec![],
        components: vec![],
        starts: vec![],
        warnings: vec![],
        replaced_packages: vec![],
        next: vec![],
    }
}

fn partition(role: &str, start: u64, size: u64) -> ReportRegion {
    ReportRegion {
        kind: ReportRegionKind::Partition,
        number: Some(1),
        role: role.into(),
        start,
        size,
        filesystem: Some("ext4".into()),
        used: Some(size / 2),
    }
}

/// Every text is an attack, and every list has something in it.
fn hostile() -> BuildReport {
    let evil =
        || "</title></style><script>alert(1)</script>\"' onload=x \u{1b}[31m &amp;".to_owned();
    let long = "x".repeat(3000);
    BuildReport {
        product: ReportProduct {
            name: evil(),
            title: long.clone(),
            version: evil(),
            ..empty().product
        },
        board: evil(),
        engine: evil(),
        suite: Some(evil()),
        commit: Some("é".repeat(50)),
        epoch: u64::from(u32::MAX) * 4,
        seconds: f64::NAN,
        stages: vec![
            ReportStage { name: evil(), seconds: -1.0, cached: false, note: evil() },
            ReportStage { name: long.clone(), seconds: 1e300, cached: true, note: evil() },
        ],
        outputs: vec![ReportOutput {
            name: evil(),
            path: evil(),
            size: u64::MAX,
            on_disk_size: 0,
            sha256: Some(evil()),
        }],
        signed_by: Some(ReportSigner { key_id: evil(), kind: ReportKind::Development }),
        disk: Some(
            ReportDisk::new(ReportTableKind::Gpt, 10, vec![partition(&evil(), 0, 10)]).unwrap(),
        ),
        root: Some(ReportRoot::new(9, 0, 4000, Some(evil()))),
        packages: vec![
            ReportPackage { name: evil(), version: evil(), installed_bytes: 0 },
            ReportPackage { name: long, version: evil(), installed_bytes: 1 << 50 },
        ],
        wheels: vec![ReportWheel { name: evil(), version: evil(), bytes: 1 << 49 }],
        largest_files: vec![PathSize { path: evil(), bytes: 5 }],
        directories: vec![PathSize { path: evil(), bytes: 0 }],
        starts: vec![xtask::start::ModelBoot {
            model: evil(),
            title: "x".repeat(3000),
            starts: false,
            steps: vec![(evil(), evil())],
        }],
        warnings: vec![evil(), format!("{}\nhelp: {}", evil(), evil())],
        replaced_packages: vec![ReportReplacement { name: evil(), old: evil(), new: evil() }],
        next: vec![evil()],
        ..empty()
    }
}

fn terminal(report: &BuildReport, style: TerminalStyle) -> String {
    let mut out = Vec::new();
    render_terminal(report, &mut out, style).unwrap();
    String::from_utf8(out).unwrap()
}

/// Compares with a file that a person has reviewed; `SLIPWAY_BLESS=1` rewrites it.
fn golden(name: &str, found: &str) {
    let path = format!("{FIXTURES}/{name}");
    if std::env::var_os("SLIPWAY_BLESS").is_some() {
        std::fs::write(&path, found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "{name} differs; SLIPWAY_BLESS=1 rewrites it. Found:\n{found}");
}

#[test]
fn terminal_goldens() {
    golden(
        "terminal-wide.txt",
        &terminal(&realistic(), TerminalStyle { color: false, width: 110 }),
    );
    golden(
        "terminal-narrow.txt",
        &terminal(&realistic(), TerminalStyle { color: false, width: 60 }),
    );
    golden(
        "terminal-color.txt",
        &terminal(&realistic(), TerminalStyle { color: true, width: 110 }),
    );
    assert_eq!(terminal(&empty(), TerminalStyle::plain()), "");
}

#[test]
fn a_terminal_gets_no_control_characters_from_names() {
    let text = terminal(&hostile(), TerminalStyle::plain());
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
}

#[test]
fn json_round_trip() {
    let report = realistic();
    let json = report.to_json().unwrap();
    assert_eq!(BuildReport::from_json(&json).unwrap(), report);
    for key in ["\"started-in\"", "\"on-disk-size\"", "\"largest-files\"", "\"signed-by\""] {
        assert!(json.contains(key), "{key} is missing");
    }
    let other = json.replacen("\"schema\": 1", "\"schema\": 99", 1);
    let error = BuildReport::from_json(&other).unwrap_err().to_string();
    assert_eq!(
        error,
        "reading a build report: its schema is 99, but this tool reads 1\n\
         help: use the version of the tool that created the report, or build again"
    );
}

/// Checks with Python's parser that every element is closed in order, ids are unique, nothing is
/// loaded from elsewhere, and prints `count of tables, of script elements`.
const CHECK_PAGE: &str = r##"
import sys
from html.parser import HTMLParser
VOID = {"meta", "br", "input", "link", "img", "hr"}
class Check(HTMLParser):
    stack, ids, tables, scripts, captions = [], set(), 0, 0, 0
    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"duplicate attribute in {tag}"
        for key, value in attrs:
            assert not key.startswith("on"), f"event handler {key}"
            assert key not in ("src", "srcset") and (key != "href" or value.startswith("#")), f"{key}={value}"
            if key == "id":
                assert value not in self.ids, f"duplicate id {value}"
                self.ids.add(value)
        self.tables += tag == "table"
        self.captions += tag == "caption"
        self.scripts += tag == "script"
        if tag not in VOID: self.stack.append(tag)
    def handle_startendtag(self, tag, attrs): pass
    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack} at {self.getpos()}"
        self.stack.pop()
check = Check()
check.feed(sys.stdin.read())
check.close()
assert not check.stack, f"never closed: {check.stack}"
assert check.tables == check.captions, "a table without a caption"
print(check.tables, check.scripts)
"##;

fn check_page(html: &str) -> String {
    let mut child = Command::new("python3")
        .args(["-c", CHECK_PAGE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("python3 is needed");
    child.stdin.take().unwrap().write_all(html.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn pages_are_well_formed() {
    assert_eq!(check_page(&render_html(&realistic()).unwrap()), "8 1");
    assert_eq!(check_page(&render_html(&empty()).unwrap()), "0 1");
    let html = render_html(&hostile()).unwrap();
    assert_eq!(check_page(&html), "9 1");
    assert!(!html.contains("<script>alert"), "a name became a script");
    assert!(html.contains("&lt;script&gt;alert"), "the hostile name is not shown at all");
}

/// `REPORT_PAGE=/tmp/report.html` keeps the realistic and the hostile page, to be looked at in a browser.
#[test]
fn the_page_can_be_looked_at() {
    let html = render_html(&realistic()).unwrap();
    if let Some(mut path) = std::env::var_os("REPORT_PAGE") {
        std::fs::write(&path, &html).unwrap();
        path.push(".hostile.html");
        std::fs::write(&path, render_html(&hostile()).unwrap()).unwrap();
    }
    for text in ["Partition map", "Time by stage", "What takes the space", "Largest files"] {
        assert!(html.contains(text), "{text} is missing");
    }
}

/// Slow (a browser starts), so only with `cargo xtask test --all`.
#[test]
fn a_real_browser_lays_the_page_out_without_overflow() {
    if !all("report::a_real_browser_lays_the_page_out_without_overflow") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let page = dir.path().join("report.html");
    // What the browser measures comes back in the title, which --dump-dom prints.
    let probe = "<script>addEventListener('load',()=>{document.title=\
        `wide ${document.documentElement.scrollWidth} of ${innerWidth}, \
        ${document.querySelectorAll('svg rect').length} rectangles`})</script></body>";
    let html = render_html(&realistic()).unwrap().replacen("</body>", probe, 1);
    std::fs::write(&page, html).unwrap();
    for width in [1280, 800] {
        let output = Command::new("chromium")
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"])
            .args(["--no-first-run", "--disable-background-networking", "--disable-sync"])
            .args(["--disable-component-update", "--dump-dom", "--virtual-time-budget=2000"])
            .arg(format!("--window-size={width},1000"))
            .arg(format!("--user-data-dir={}", dir.path().join(width.to_string()).display()))
            .arg(format!("file://{}", page.display()))
            .output()
            .expect("chromium is installed: cargo xtask doctor --install");
        let dom = String::from_utf8(output.stdout).unwrap();
        let title = dom.split("<title>").nth(1).and_then(|t| t.split('<').next()).unwrap_or("");
        let numbers: Vec<u32> =
            title.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
        let [wide, window, rectangles] = numbers[..] else { panic!("the title is {title:?}") };
        assert!(wide <= window, "{width}: the page is wider than its window: {title}");
        assert!(rectangles > 100, "{width}: the drawings are missing: {title}");
    }
}

#[test]
fn the_same_report_gives_the_same_page() {
    assert_eq!(render_html(&realistic()).unwrap(), render_html(&realistic()).unwrap());
}

fn attribute(tag: &str, name: &str) -> f64 {
    let (_, rest) = tag.split_once(&format!(" {name}=\"")).expect(name);
    rest.split('"').next().unwrap().parse().unwrap()
}

#[test]
fn partitions_are_to_scale() {
    let report = realistic();
    let disk = report.disk.as_ref().unwrap();
    let html = render_html(&report).unwrap();
    let drawings: Vec<&str> = html.split("<svg").filter(|svg| svg.contains("data-start")).collect();
    assert_eq!(drawings.len(), 2, "one wide, one narrow");
    for drawing in drawings {
        let view: Vec<f64> = {
            let (_, rest) = drawing.split_once("viewBox=\"").unwrap();
            let view = rest.split('"').next().unwrap();
            view.split(' ').map(|number| number.parse().unwrap()).collect()
        };
        let scale = view[2] / disk.size as f64;
        let blocks: Vec<&str> =
            drawing.split("<rect").filter(|tag| tag.contains("data-start")).collect();
        assert_eq!(blocks.len(), disk.regions.len());
        for block in blocks {
            let (start, size) = (attribute(block, "data-start"), attribute(block, "data-size"));
            let region = disk.regions.iter().find(|r| r.start as f64 == start).unwrap();
            assert_eq!(region.size as f64, size);
            let (x, width) = (attribute(block, "x"), attribute(block, "width"));
            let least = if region.kind == ReportRegionKind::Gap { 0.0 } else { 3.0 };
            assert!((x - start * scale).abs() < 0.01, "{region:?} is drawn at {x}");
            assert!((width - (size * scale).max(least)).abs() < 0.01, "{region:?}: {width}");
        }
    }
}

#[test]
fn a_card_has_no_overlaps_and_no_holes() {
    let disk = ReportDisk::new(
        ReportTableKind::Mbr,
        100,
        vec![partition("root-a", 40, 20), partition("boot", 10, 30)],
    )
    .unwrap();
    let found: Vec<(&str, u64, u64)> =
        disk.regions.iter().map(|r| (r.role.as_str(), r.start, r.size)).collect();
    let expected = [("unused", 0, 10), ("boot", 10, 30), ("root-a", 40, 20), ("unused", 60, 40)];
    assert_eq!(found, expected);

    let regions = vec![partition("boot", 0, 50), partition("root-a", 49, 10)];
    let error = ReportDisk::new(ReportTableKind::Mbr, 100, regions).unwrap_err().to_string();
    assert_eq!(
        error,
        "describing the card: `root-a` starts at byte 49, but `boot` ends at byte 50"
    );
    let error =
        ReportDisk::new(ReportTableKind::Mbr, 100, vec![partition("data", 90, 11)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "describing the card: `data` ends at byte 101, but the card has 100 bytes"
    );
}

#[test]
fn fill_is_rounded_up() {
    assert_eq!(ReportRoot::new(1, 1000, 90, None).fill_percent, 1);
    assert_eq!(ReportRoot::new(1001, 1000, 90, None).fill_percent, 101);
    assert_eq!(ReportRoot::new(0, 0, 90, None).fill_percent, 0);
}
