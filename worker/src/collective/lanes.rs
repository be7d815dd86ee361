//! Whether the lanes that a caller hands in can be summed.

use super::CollectiveError;

/// Refuses lanes of a bucket that are none, other than `expected` (nothing = any number), or of different
/// lengths.
pub(super) fn check_bucket(
    operation: &str,
    lanes: &[Vec<f32>],
    expected: Option<u32>,
) -> Result<(), CollectiveError> {
    check_count(operation, lanes.len(), expected)?;
    let len = lanes[0].len();
    match lanes.iter().position(|lane| lane.len() != len) {
        None => Ok(()),
        Some(other) => Err(wrong(
            operation,
            format!(
                "lane 0 has {len} values and lane {other} has {}; all lanes of a bucket are equally long",
                lanes[other].len()
            ),
        )),
    }
}

/// Refuses `values` that are not one or more lanes of `lane_len` values, `expected` ones (nothing = any
/// number).
pub(super) fn check_row(
    operation: &str,
    values: usize,
    lane_len: usize,
    expected: Option<u32>,
) -> Result<(), CollectiveError> {
    if lane_len == 0 && values == 0 {
        return Ok(());
    }
    if lane_len == 0 || !values.is_multiple_of(lane_len) {
        return Err(wrong(operation, format!("{values} values are no whole lanes of {lane_len}")));
    }
    check_count(operation, values / lane_len, expected)
}

fn check_count(operation: &str, count: usize, expected: Option<u32>) -> Result<(), CollectiveError> {
    match expected {
        _ if count == 0 => Err(wrong(operation, "there is no lane to sum".into())),
        Some(expected) if count != expected as usize => {
            Err(wrong(operation, format!("this rank was given {expected} lanes, not {count}")))
        }
        _ => Ok(()),
    }
}

fn wrong(operation: &str, detail: String) -> CollectiveError {
    CollectiveError::Local { operation: operation.into(), detail, source: None }
}
