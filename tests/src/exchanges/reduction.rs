//! Makes an exchange that shows a fault shorter.

use super::{Exchange, Step};

/// Limit of attempts, each of which plays an exchange.
const ATTEMPTS: usize = 300;

/// Returns the shortest exchange found for which `fails` still holds. Answers are no longer
/// expected of it, since they may change.
pub(super) fn reduce(exchange: &Exchange, mut fails: impl FnMut(&Exchange) -> bool) -> Exchange {
    let mut least = Exchange { expected: None, ..exchange.clone() };
    if !fails(&least) {
        return exchange.clone();
    }
    let mut attempts = ATTEMPTS;
    let mut step = 0;
    while step < least.steps.len() {
        let Step::Send(bytes) = least.steps[step].clone() else {
            least.steps.remove(step);
            continue;
        };
        let mut bytes = bytes;
        let mut length = bytes.len();
        while length > 0 && attempts > 0 {
            let mut at = 0;
            while at < bytes.len() && attempts > 0 {
                attempts -= 1;
                let mut shorter = bytes.clone();
                shorter.drain(at..shorter.len().min(at + length));
                let mut candidate = least.clone();
                candidate.steps[step] = Step::Send(shorter.clone());
                if fails(&candidate) {
                    (bytes, least) = (shorter, candidate);
                } else {
                    at += length;
                }
            }
            length /= 2;
        }
        step += 1;
    }
    least.steps.retain(|step| *step != Step::Send(Vec::new()));
    least
}
