//! [`kept_lines`]: which lines of a `metrics.jsonl` that was found in the store are to be believed.

/// What is read back of a line of metrics.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
pub struct KeptLine {
    /// Its step.
    pub step: u64,
    /// None: it was not finite.
    pub d_loss: Option<f64>,
    /// None: it was not finite.
    pub g_loss: Option<f64>,
}

/// The lines up to the first that cannot be right: one that is no line of metrics, or does not come after the one
/// before. Of two in the wrong order either may be the wrong one, so both go. What follows goes too: a curve with a
/// hole would mislead. `began` is the step before the run's first one.
///
/// A digit that became another one and leaves the order as it is is not found: the lines are for people and have no
/// checksums. `takuma run audit` finds it in the steps and the images that they tell of.
pub fn kept_lines<'a>(lines: impl Iterator<Item = &'a [u8]>, began: u64) -> Vec<KeptLine> {
    let mut kept: Vec<KeptLine> = Vec::new();
    for line in lines.map_while(|line| serde_json::from_slice::<KeptLine>(line).ok()) {
        if line.step <= kept.last().map_or(began, |before| before.step) {
            kept.pop();
            break;
        }
        kept.push(line);
    }
    kept
}

/// The whole lines of a text.
pub fn lines(content: &[u8]) -> impl Iterator<Item = &[u8]> {
    // A line without an end is a torn one.
    let whole = content.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    content[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(content: &[u8], began: u64) -> Vec<u64> {
        kept_lines(lines(content), began).into_iter().map(|line| line.step).collect()
    }

    #[test]
    fn lines_are_kept_up_to_the_first_that_cannot_be_right() {
        assert_eq!(steps(b"", 0), [] as [u64; 0]);
        assert_eq!(steps(b"{\"step\":1}\n{\"step\":2}\n{\"step\":3", 0), [1, 2]);
        assert_eq!(steps(b"{\"step\":1}\ngarbage\n{\"step\":3}\n", 0), [1]);
        assert_eq!(steps(b"{\"step\":1}\n{\"step\":7}\n{\"step\":3}\n", 0), [1]);
        assert_eq!(steps(b"{\"step\":6}\n{\"step\":7}\n", 5), [6, 7]);
        assert_eq!(steps(b"{\"step\":4}\n{\"step\":7}\n", 5), [] as [u64; 0]);
    }

    #[test]
    fn whatever_bit_flips_no_line_is_doubled_and_none_behind_the_damage_is_believed_wrongly() {
        let line = |step: u64| format!("{{\"step\":{step},\"d_loss\":0.5,\"g_loss\":null,\"fed\":{step}}}\n");
        let whole: String = (1..=12).map(line).collect();
        let undamaged = kept_lines(lines(whole.as_bytes()), 0);
        for at in 0..whole.len() {
            let damaged = whole.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count();
            for bit in 0..8 {
                let mut flipped = whole.clone().into_bytes();
                flipped[at] ^= 1 << bit;
                let kept = kept_lines(lines(&flipped), 0);
                assert!(kept.is_sorted_by(|a, b| a.step < b.step), "bit {bit} of byte {at}");
                // Everything but the damaged line is as it was written.
                for (number, line) in kept.iter().enumerate().filter(|&(number, _)| number != damaged) {
                    assert_eq!(line, &undamaged[number], "bit {bit} of byte {at}");
                }
            }
            assert_eq!(kept_lines(lines(&whole.as_bytes()[..at]), 0), undamaged[..damaged]);
        }
    }
}
