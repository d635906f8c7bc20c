//! Tasks without which the agent does not do its job: that one has ended, whether by itself or by a panic, is noticed at
//! once.

use tokio::sync::mpsc;

/// Hears of the end of vital tasks.
#[derive(Debug)]
pub struct CriticalTasks {
    ends: mpsc::UnboundedReceiver<&'static str>,
    ended: mpsc::UnboundedSender<&'static str>,
}

/// Says so when it is dropped.
struct Guard {
    name: &'static str,
    ended: mpsc::UnboundedSender<&'static str>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Whoever has stopped listening ends by itself.
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
    /// Makes a task vital, under a name for people.
    pub fn task<F: Future>(&self, name: &'static str, task: F) -> impl Future<Output = F::Output> + use<F> {
        let guard = Guard { name, ended: self.ended.clone() };
        async move {
            let _guard = guard;
            task.await
        }
    }

    /// Waits until a vital task has ended, and tells which.
    pub async fn first_end(&mut self) -> &'static str {
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
        let mut vital = CriticalTasks::default();
        let lasting = tokio::spawn(vital.task("lasting", std::future::pending::<()>()));
        let broken = tokio::spawn(vital.task("broken", async { panic!("as it must") }));
        assert_eq!(vital.first_end().await, "broken");
        assert!(broken.await.is_err_and(|error| error.is_panic()));
        lasting.abort();
        assert_eq!(vital.first_end().await, "lasting");
    }
}
