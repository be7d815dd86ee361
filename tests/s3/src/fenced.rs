//! [`Fenced`]: conditional writes that hold under races.

use std::hash::{BuildHasher, RandomState};

use s3s::dto::*;
use s3s::{S3, S3Request, S3Response, S3Result};
use tokio::sync::{Mutex, MutexGuard};

/// More than the writes under way at any time, so that two keys seldom share a lock.
const LOCKS: usize = 1024;

/// An S3 backend that does one write of a key at a time.
///
/// `s3s-fs` looks whether the object is there, then receives the body, then writes: of writers that
/// race with `If-None-Match: *` several pass the first step. Here the three steps are one. A write
/// holds its lock while its body arrives; a client that goes away ends its request and frees it.
///
/// Answers what object-store clients ask; everything else is "not implemented".
#[derive(Debug)]
pub struct Fenced<B> {
    backend: B,
    locks: Vec<Mutex<()>>,
    hasher: RandomState,
}

impl<B> Fenced<B> {
    /// Puts the fence around a backend.
    #[must_use]
    pub fn new(backend: B) -> Self {
        Self { backend, locks: (0..LOCKS).map(|_| Mutex::default()).collect(), hasher: RandomState::new() }
    }

    /// The one lock of a key. Nobody holds two, so nobody waits in a circle.
    async fn lock(&self, bucket: &str, key: &str) -> MutexGuard<'_, ()> {
        let hash = self.hasher.hash_one((bucket, key));
        // A remainder of 1024 fits any usize.
        let index = (hash % LOCKS as u64) as usize;
        self.locks[index].lock().await
    }
}

/// Writes the S3 trait's implementation: the methods under `locked` hold the lock of their key meanwhile,
/// those under `free` go to the backend as they are.
macro_rules! fence {
    (
        locked { $($locked:ident: $locked_input:ident -> $locked_output:ident;)* }
        free { $($free:ident: $free_input:ident -> $free_output:ident;)* }
    ) => {
        #[async_trait::async_trait]
        impl<B: S3> S3 for Fenced<B> {
            $(async fn $locked(&self, req: S3Request<$locked_input>) -> S3Result<S3Response<$locked_output>> {
                let _held = self.lock(&req.input.bucket, &req.input.key).await;
                self.backend.$locked(req).await
            })*

            $(async fn $free(&self, req: S3Request<$free_input>) -> S3Result<S3Response<$free_output>> {
                self.backend.$free(req).await
            })*
        }
    };
}

fence! {
    locked {
        complete_multipart_upload: CompleteMultipartUploadInput -> CompleteMultipartUploadOutput;
        copy_object: CopyObjectInput -> CopyObjectOutput;
        delete_object: DeleteObjectInput -> DeleteObjectOutput;
        put_object: PutObjectInput -> PutObjectOutput;
    }
    free {
        abort_multipart_upload: AbortMultipartUploadInput -> AbortMultipartUploadOutput;
        create_bucket: CreateBucketInput -> CreateBucketOutput;
        create_multipart_upload: CreateMultipartUploadInput -> CreateMultipartUploadOutput;
        delete_objects: DeleteObjectsInput -> DeleteObjectsOutput;
        get_bucket_location: GetBucketLocationInput -> GetBucketLocationOutput;
        get_object: GetObjectInput -> GetObjectOutput;
        head_bucket: HeadBucketInput -> HeadBucketOutput;
        head_object: HeadObjectInput -> HeadObjectOutput;
        list_buckets: ListBucketsInput -> ListBucketsOutput;
        list_objects: ListObjectsInput -> ListObjectsOutput;
        list_objects_v2: ListObjectsV2Input -> ListObjectsV2Output;
        list_parts: ListPartsInput -> ListPartsOutput;
        upload_part: UploadPartInput -> UploadPartOutput;
    }
}
