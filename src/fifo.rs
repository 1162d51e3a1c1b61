//! Queues that are filled and emptied again and again.

use std::collections::VecDeque;

/// Takes what has waited longest.
///
/// A queue that becomes empty begins at its first slot again. Else it would wander through all the
/// memory that it has reserved, where what it needs fits into a cache line or two.
pub fn pop<T>(queue: &mut VecDeque<T>) -> Option<T> {
    let first = queue.pop_front();
    if queue.is_empty() {
        queue.clear();
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emptied_queue_stays_where_it_is() {
        let mut queue = VecDeque::with_capacity(1000);
        queue.push_back(0);
        let slot = std::ptr::from_ref(&queue[0]);
        for turn in 0..3 {
            queue.push_back(turn);
            assert_eq!(pop(&mut queue), Some(0));
            assert_eq!(pop(&mut queue), Some(turn));
            assert_eq!(pop(&mut queue), None);
            queue.push_back(0);
            assert_eq!(std::ptr::from_ref(&queue[0]), slot);
        }
    }
}
