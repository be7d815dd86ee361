//! The wire contract between coordinator, workers and CLI, generated from `takuma/v1/*.proto`.
//!
//! Documentation of every message and field stands in the .proto files.

/// Version 1 of the contract.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("takuma.v1");
}

/// Number that coordinator, worker and CLI greet each other with; unequal numbers are refused in words.
pub const PROTOCOL_VERSION: u32 = 4;
