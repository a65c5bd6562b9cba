//! Work that may block, away from the tasks that must not.

/// Runs it where it may block. A panic in it goes on here: whoever asked cannot continue as if it had
/// an answer.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that is going down refuses work, and it does not wake us again.
            Err(error) => panic!("work of the state line was cancelled: {error}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_who_asked() {
        assert_eq!(blocking(|| 7).await, 7);
        let asking = tokio::spawn(async { blocking(|| panic!("a bug")).await });
        let panic = asking.await.unwrap_err().into_panic();
        assert_eq!(panic.downcast_ref(), Some(&"a bug"));
    }
}
