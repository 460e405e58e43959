//! Work on the items of a list, by several threads.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Result;

/// The number of threads that this process can run at the same time.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Runs `work` for each item, on at most `threads` threads. The results are in the order of the items.
///
/// # Errors
/// The first error in the order of the items. After an error no further item is begun.
///
/// # Panics
/// When `work` panics, with the same payload.
pub fn map<T: Sync, R: Send>(
    items: &[T],
    threads: usize,
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    map_with(items, threads, || Ok(()), |(), item| work(item))
}

/// Like [`map`]. Each thread passes its own state to `work`, for example a buffer. It creates the state before its
/// first item.
///
/// # Errors
/// As [`map`]; an error of `state` is an error of the item that the thread would have begun.
///
/// # Panics
/// As [`map`].
pub fn map_with<T: Sync, S, R: Send>(
    items: &[T],
    threads: usize,
    state: impl Fn() -> Result<S> + Sync,
    work: impl Fn(&mut S, &T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let run = || {
        let (mut own, mut done) = (None, Vec::new());
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { break };
            let result = match &mut own {
                Some(own) => work(own, item),
                None => state().and_then(|new| work(own.insert(new), item)),
            };
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            done.push((index, result));
        }
        done
    };
    let mut done = std::thread::scope(|scope| {
        let threads = threads.max(1).min(items.len());
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        let mut done = Vec::with_capacity(items.len());
        for thread in threads {
            done.extend(thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    // Items are begun in order and a begun item is completed: the first error does not depend on the threads.
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;
    use std::time::Duration;

    use anyhow::{bail, ensure};

    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        let items: Vec<u64> = (0..64).collect();
        for threads in [0, 1, 3, 100] {
            // The first item is completed last.
            let doubled = map(&items, threads, |item| {
                std::thread::sleep(Duration::from_millis(u64::from(*item == 0) * 20));
                Ok(item * 2)
            });
            let expected: Vec<u64> = items.iter().map(|item| item * 2).collect();
            assert_eq!(doubled.expect("no item fails"), expected, "{threads} threads");
        }
    }

    #[test]
    fn an_empty_list_creates_no_state() {
        let state = || -> Result<()> { bail!("created") };
        let results = map_with(&[] as &[u8], 4, state, |(), item| Ok(*item));
        assert!(results.expect("no state was created").is_empty());
    }

    #[test]
    fn the_first_error_in_order_is_returned_and_stops_the_work() {
        let items: Vec<usize> = (0..1000).collect();
        let begun = AtomicUsize::new(0);
        let (slow, fast) = (3, 5);
        let error = map(&items, 8, |item| {
            begun.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(if *item == slow { 50 } else { 1 }));
            ensure!(*item != slow && *item != fast, "item {item}");
            Ok(())
        })
        .expect_err("two items fail");
        assert_eq!(error.to_string(), "item 3");
        let begun = begun.into_inner();
        assert!(begun < items.len() / 2, "{begun} items were begun");
    }

    #[test]
    fn one_thread_begins_nothing_after_an_error() {
        let begun = Mutex::new(Vec::new());
        let result = map(&[1, 2, 3], 1, |item| {
            begun.lock().expect("no thread panicked").push(*item);
            ensure!(*item != 2, "item {item}");
            Ok(())
        });
        assert_eq!(result.expect_err("an item fails").to_string(), "item 2");
        assert_eq!(begun.into_inner().expect("no thread panicked"), [1, 2]);
    }

    #[test]
    fn each_thread_has_one_state() {
        let created = AtomicUsize::new(0);
        let state = || Ok(created.fetch_add(1, Ordering::Relaxed));
        let work = |state: &mut usize, _: &u8| {
            std::thread::sleep(Duration::from_millis(1));
            Ok(*state)
        };
        let used = map_with(&[0; 64], 4, state, work).expect("no item fails");
        let used: BTreeSet<usize> = used.into_iter().collect();
        let created = created.into_inner();
        assert!((1..=4).contains(&created), "{created} states were created");
        assert_eq!(used, (0..created).collect());
    }

    #[test]
    fn an_error_of_the_state_is_returned() {
        let state = || -> Result<()> { bail!("no handle") };
        let error = map_with(&[1, 2], 2, state, |(), _| Ok(())).expect_err("no state");
        assert_eq!(error.to_string(), "no handle");
    }

    #[test]
    #[should_panic(expected = "item 7")]
    fn a_panic_is_resumed() {
        drop(map(&[1, 7, 2], 2, |item| {
            assert!(*item != 7, "item {item}");
            Ok(())
        }));
    }
}
