//! Words in memory that host and GPU both see.

use std::{
    any::Any,
    ffi::c_uint,
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use super::library::CudaRuntime;
use crate::collective::{CollectiveError, EndedWord};

/// `cudaHostAllocPortable | cudaHostAllocMapped`: for all devices, and in their address space. Where host and device
/// have one address space, which is everywhere where there is this NCCL, it has one address for both.
const SHARED: c_uint = 3;

/// Words that nobody has any more. They stay the process', since to free page-locked memory waits for the GPU, which may
/// hang; and a group has one word.
#[derive(Debug, Default)]
pub(super) struct SpareWords(Mutex<Vec<Word>>);

#[derive(Debug)]
struct Word(*mut AtomicU32);

// SAFETY: an atomic that is never freed.
unsafe impl Send for Word {}
// SAFETY: as above.
unsafe impl Sync for Word {}

/// A word in use.
struct Used {
    word: Option<Word>,
    cuda: Arc<CudaRuntime>,
}

impl Drop for Used {
    fn drop(&mut self) {
        self.cuda.spare_words.lock().extend(self.word.take());
    }
}

impl SpareWords {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Word>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A word for a new group.
///
/// # Errors
/// [`CollectiveError::Local`]: there is no memory that can be page-locked.
pub(super) fn new_word(cuda: &Arc<CudaRuntime>) -> Result<EndedWord, CollectiveError> {
    let spare = cuda.spare_words.lock().pop();
    let word = match spare {
        Some(word) => word,
        None => {
            let mut memory = ptr::null_mut();
            // SAFETY: writes the address.
            let code = unsafe { (cuda.host_alloc)(&raw mut memory, size_of::<AtomicU32>(), SHARED) };
            if code != 0 {
                return Err(CollectiveError::Local {
                    operation: super::FORMING.into(),
                    detail: format!(
                        "no page-locked memory can be had: {}; raise the limit of locked memory (ulimit -l)",
                        cuda.words(code)
                    ),
                    source: None,
                });
            }
            Word(memory.cast())
        }
    };
    let address = word.0;
    // SAFETY: memory of this size, aligned to pages, that is never freed, and nobody else has it.
    unsafe { &*address }.store(0, Ordering::SeqCst);
    let owner: Arc<dyn Any + Send + Sync> = Arc::new(Used { word: Some(word), cuda: Arc::clone(cuda) });
    // SAFETY: the word is 0 and stays for as long as its owner keeps it from the spare ones.
    Ok(unsafe { EndedWord::new(address, owner) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::nccl::fake;

    #[test]
    fn word_of_a_group_that_is_gone_is_given_out_again_as_new() {
        let cuda = fake::config().cuda;
        let (first, other) = (new_word(&cuda).unwrap(), new_word(&cuda).unwrap());
        let address = first.as_ptr();
        assert_ne!(address, other.as_ptr());
        let kept = first.clone();
        first.set();
        drop(first);
        assert_ne!(new_word(&cuda).unwrap().as_ptr(), address, "somebody has it still");
        // SAFETY: a word that lives.
        assert_eq!(unsafe { *kept.as_ptr() }, 1);
        drop(kept);
        let again = new_word(&cuda).unwrap();
        assert_eq!(again.as_ptr(), address);
        // SAFETY: as above.
        assert_eq!(unsafe { *again.as_ptr() }, 0);
    }
}
