//! `bootmodel::chain`: good cards have no findings; earlier cards, and one mutant for each rule, are detected with the
//! message in `tests/golden`.

mod attack;
mod mutants;
mod stand_in;
mod tables;
mod watchdog;

use bootmodel::chain::{BootFacts, CardContent, ChainVerdict, check};

fn facts() -> BootFacts {
    BootFacts::known().expect("the facts")
}

/// All findings as text.
fn shown(verdict: &ChainVerdict) -> String {
    verdict.findings.iter().map(|finding| format!("{:?}: {finding}\n", finding.level)).collect()
}

/// All chains as text.
fn chains(card: &CardContent) -> String {
    let mut out = String::new();
    for chain in check(card, &facts()).chains {
        out.push_str(&format!("{} ({})\n", chain.title, chain.model));
        for step in chain.steps {
            out.push_str(&format!("  {:<9} {}\n", step.who, step.what));
        }
    }
    out
}

/// Compares with a golden text; `SLIPWAY_BLESS=1` rewrites it.
fn golden(name: &str, found: &str) {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("SLIPWAY_BLESS").is_some() {
        std::fs::write(&path, found).expect("the golden text");
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(expected == found, "{path} differs; SLIPWAY_BLESS=1 writes:\n{found}");
}

#[test]
fn good_cards_start_on_every_model() {
    for (name, card) in
        [("3", stand_in::card_3()), ("4", stand_in::card_4()), ("5", stand_in::card_5())]
    {
        let verdict = check(&card, &facts());
        // A finding about a board whose revision is uncertain stays a warning.
        let stops: Vec<_> = verdict.stops().collect();
        assert!(stops.is_empty(), "card {name}:\n{}", shown(&verdict));
        assert!(verdict.chains.len() == 3 && verdict.chains.iter().all(|chain| chain.starts));
        let rest = verdict.findings.iter().filter(|finding| finding.rule != "firmware-old");
        assert_eq!(rest.count(), 0, "card {name}:\n{}", shown(&verdict));
    }
}

#[test]
fn the_chain_is_shown_with_the_file_taken_at_each_step() {
    let all = [stand_in::card_3(), stand_in::card_4(), stand_in::card_5()];
    golden("chains.txt", &all.iter().map(chains).collect::<String>());
}
