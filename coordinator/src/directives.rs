//! Directives on their way to one worker: a bounded queue in which what the store has takes one place, however often it
//! changes. After an outage a store takes hundreds of objects within a millisecond, and each is news to every worker.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use takuma_proto::v1::WorkerDirective;
use takuma_proto::v1::worker_directive::Directive;
use tokio_stream::Stream;
use tonic::Status;

/// Directives that a worker has not taken yet. It takes them from a task of its own, so more means it is stuck.
const MAX_DIRECTIVES: usize = 64;

/// Where they go in. The stream ends behind the last one when this is dropped.
#[derive(Debug)]
pub struct DirectiveSender(Arc<Mutex<Queue>>);

/// Where they come out: what the worker is sent.
#[derive(Debug)]
pub struct DirectiveStream(Arc<Mutex<Queue>>);

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<WorkerDirective>,
    /// One of the two ends is gone.
    closed: bool,
    reader: Option<Waker>,
}

/// A queue for one session.
#[must_use]
pub fn queue() -> (DirectiveSender, DirectiveStream) {
    let queue = Arc::<Mutex<Queue>>::default();
    (DirectiveSender(Arc::clone(&queue)), DirectiveStream(queue))
}

impl DirectiveSender {
    /// Adds a directive. `false`: the session is over, or does not take what it is sent.
    #[must_use]
    pub fn send(&self, directive: WorkerDirective) -> bool {
        let mut queue = lock(&self.0);
        if queue.closed {
            return false;
        }
        let Some(directive) = queue.merge(directive) else { return true };
        if queue.waiting.len() == MAX_DIRECTIVES {
            return false;
        }
        queue.waiting.push_back(directive);
        queue.wake();
        true
    }
}

impl Queue {
    /// Puts news of what the store has in the place of older ones that stand last in the queue; else gives the
    /// directive back.
    fn merge(&mut self, directive: WorkerDirective) -> Option<WorkerDirective> {
        let (Some(Directive::Kept(newer)), Some(Directive::Kept(older))) =
            (&directive.directive, self.waiting.back_mut().and_then(|last| last.directive.as_mut()))
        else {
            return Some(directive);
        };
        if newer.run != older.run {
            return Some(directive);
        }
        let resend = older.resend || newer.resend;
        *older = newer.clone();
        older.resend = resend;
        None
    }

    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

impl Stream for DirectiveStream {
    type Item = Result<WorkerDirective, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut queue = lock(&self.0);
        if let Some(directive) = queue.waiting.pop_front() {
            return Poll::Ready(Some(Ok(directive)));
        }
        if queue.closed {
            return Poll::Ready(None);
        }
        queue.reader = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for DirectiveSender {
    fn drop(&mut self) {
        let mut queue = lock(&self.0);
        queue.closed = true;
        queue.wake();
    }
}

impl Drop for DirectiveStream {
    fn drop(&mut self) {
        lock(&self.0).closed = true;
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use takuma_proto::v1;
    use tokio_stream::StreamExt;

    use super::*;

    fn wrap(directive: Directive) -> WorkerDirective {
        WorkerDirective { directive: Some(directive) }
    }

    fn kept(run: &str, step: u64, resend: bool) -> WorkerDirective {
        wrap(Directive::Kept(v1::Kept { run: run.to_owned(), step, resend, ..v1::Kept::default() }))
    }

    fn farewell() -> WorkerDirective {
        wrap(Directive::Farewell(v1::Farewell {}))
    }

    #[tokio::test]
    async fn hundreds_of_news_of_the_store_take_one_place_and_keep_their_order_among_the_others() {
        let (sender, stream) = queue();
        assert!(sender.send(kept("a", 1, true)));
        for step in 2..500 {
            assert!(sender.send(kept("a", step, false)));
        }
        assert!(sender.send(kept("b", 7, false)));
        assert!(sender.send(farewell()));
        assert!(sender.send(kept("b", 8, false)));
        drop(sender);
        let sent: Vec<_> = stream.map(Result::unwrap).collect().await;
        assert_eq!(sent, [kept("a", 499, true), kept("b", 7, false), farewell(), kept("b", 8, false)]);
    }

    #[tokio::test]
    async fn a_worker_that_takes_nothing_is_found_out_and_one_that_waits_is_woken() {
        let (sender, mut stream) = queue();
        for _ in 0..MAX_DIRECTIVES {
            assert!(sender.send(farewell()));
        }
        assert!(!sender.send(farewell()));
        for _ in 0..MAX_DIRECTIVES {
            assert!(stream.next().await.is_some());
        }
        let waits = tokio::spawn(async move { stream.next().await });
        tokio::task::yield_now().await;
        assert!(sender.send(farewell()));
        assert!(waits.await.unwrap().is_some());
        assert!(!sender.send(farewell()), "nobody reads any more");
    }
}
