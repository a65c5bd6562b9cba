//! Work that may block, away from the tasks that must not.

/// Runs it where it may block. A panic in it goes on here: whoever asked cannot continue as if it had
/// an answer.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Cancelled: only a runtime that is going down does that. It drops whoever waits here.
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_panic_ends_who_asked() {
        assert_eq!(blocking(|| 7).await, 7);
        let asking = tokio::spawn(async { blocking(|| panic!("a bug")).await });
        let panic = asking.await.unwrap_err().into_panic();
        assert_eq!(panic.downcast_ref(), Some(&"a bug"));
    }

    #[test]
    fn a_runtime_that_goes_down_ends_the_work_quietly() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let handle = runtime.handle().clone();
        runtime.shutdown_background();
        let _inside = handle.enter();
        assert!(blocking(|| 7).now_or_never().is_none());
    }
}
