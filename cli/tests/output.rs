//! YAML says the same as JSON; text from outside cannot drive a terminal.

use gabion_cli::output::{printable, yaml};
use serde_json::json;

#[test]
fn yaml_is_block_style_with_quoted_strings() {
    let value = json!({
        "name": "a: b # c",
        "none": null,
        "osds": [{ "id": 1, "tags": [] }, { "id": 2, "tags": ["x", "no"] }],
        "active+clean": 64,
        "empty": {},
    });
    let text = yaml(&value);
    for line in [
        "name: \"a: b # c\"",
        "none: null",
        "\"active+clean\": 64",
        "empty: {}",
        "    tags: []",
        "      - \"no\"",
    ] {
        assert!(text.lines().any(|l| l == line), "{line:?} is not in\n{text}");
    }
}

#[test]
fn control_characters_are_blanked() {
    assert_eq!(printable("a\x1b[31mb\nc"), "a [31mb c");
}
