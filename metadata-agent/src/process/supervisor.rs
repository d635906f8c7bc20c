//! Tasks that the agent cannot work without. Their end, by itself or by a panic, is noticed at
//! once.

use tokio::sync::mpsc;

/// Receives the names of critical tasks that ended.
#[derive(Debug)]
pub(crate) struct CriticalTasks {
    ends: mpsc::UnboundedReceiver<&'static str>,
    ended: mpsc::UnboundedSender<&'static str>,
}

/// Reports the end of a task when it is dropped.
struct Guard {
    name: &'static str,
    ended: mpsc::UnboundedSender<&'static str>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Without a receiver, the agent is stopping already.
        let _ = self.ended.send(self.name);
    }
}

impl Default for CriticalTasks {
    fn default() -> Self {
        let (ended, ends) = mpsc::unbounded_channel();
        Self { ends, ended }
    }
}

impl CriticalTasks {
    /// Makes a task critical. The name is for messages.
    pub(crate) fn task<F: Future>(
        &self,
        name: &'static str,
        task: F,
    ) -> impl Future<Output = F::Output> + use<F> {
        let guard = Guard { name, ended: self.ended.clone() };
        async move {
            let _guard = guard;
            task.await
        }
    }

    /// Waits until a critical task has ended, and returns its name.
    pub(crate) async fn first_end(&mut self) -> &'static str {
        match self.ends.recv().await {
            Some(name) => name,
            None => unreachable!("this value holds a sender itself"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_named() {
        let mut critical = CriticalTasks::default();
        let lasting = tokio::spawn(critical.task("lasting", std::future::pending::<()>()));
        let broken = tokio::spawn(critical.task("broken", async { panic!("as it must") }));
        assert_eq!(critical.first_end().await, "broken");
        assert!(broken.await.is_err_and(|error| error.is_panic()));
        lasting.abort();
        assert_eq!(critical.first_end().await, "lasting");
    }
}
