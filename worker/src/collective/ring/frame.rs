//! The header in front of every piece of data on the ring, and what an operation is called.

use std::fmt;

use takuma_core::ids::Generation;

/// Bytes of a header on the wire.
pub(super) const HEADER_BYTES: usize = 40;

/// Most payload in one frame. A rank forwards a frame once it has it whole, so this is the grain of
/// the pipeline. Of 32 to 512 KiB, 128 and 256 cost the least processor time on loopback; the smaller
/// one leaves a frame in the second-level cache between receiving and adding.
pub(super) const FRAME_PAYLOAD_BYTES: usize = 128 * 1024;

const MAGIC: u32 = u32::from_le_bytes(*b"TKF1");

/// What the ranks do together. The number is the wire's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Kind {
    Bucket = 1,
    Sum = 2,
    SumF64 = 3,
    Lengths = 4,
    Gather = 5,
    BroadcastLength = 6,
    Broadcast = 7,
    Barrier = 8,
    Chain = 9,
    ChainF64 = 10,
}

impl Kind {
    const ALL: [Self; 10] = [
        Self::Bucket,
        Self::Sum,
        Self::SumF64,
        Self::Lengths,
        Self::Gather,
        Self::BroadcastLength,
        Self::Broadcast,
        Self::Barrier,
        Self::Chain,
        Self::ChainF64,
    ];

    /// What the operation is called before it has a number.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bucket => "all_reduce of a bucket",
            Self::Sum | Self::SumF64 => "all_reduce",
            Self::Lengths | Self::Gather => "all_gather",
            Self::BroadcastLength | Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
            Self::Chain => "chain_reduce of a bucket",
            Self::ChainF64 => "chain_reduce",
        }
    }
}

/// One operation: equal on all ranks, or they have gone different ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Operation {
    pub kind: Kind,
    /// Counts the operations of one channel.
    pub sequence: u64,
    /// Values or bytes of the whole operation; the root's rank for [`Kind::BroadcastLength`].
    pub total: u64,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, sequence, total } = self;
        match kind {
            Kind::Bucket => write!(f, "all_reduce {sequence} of a bucket of {total} values"),
            Kind::Sum => write!(f, "all_reduce {sequence} of {total} values"),
            Kind::SumF64 => write!(f, "all_reduce {sequence} of {total} f64 values"),
            Kind::Lengths => write!(f, "all_gather {sequence}"),
            Kind::Gather => write!(f, "all_gather {sequence} of {total} bytes"),
            Kind::BroadcastLength => write!(f, "broadcast {sequence} from rank {total}"),
            Kind::Broadcast => write!(f, "broadcast {sequence} of {total} bytes"),
            Kind::Barrier => write!(f, "barrier {sequence}"),
            Kind::Chain => write!(f, "chain_reduce {sequence} of a bucket of {total} values"),
            Kind::ChainF64 => write!(f, "chain_reduce {sequence} of {total} f64 values"),
        }
    }
}

/// What a frame claims to be. A receiver knows beforehand every field of the next header, so a header
/// is compared, never believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub operation: Operation,
    pub generation: Generation,
    /// Which block of the operation's stream.
    pub hop: u16,
    /// Where in the block, in bytes.
    pub offset: u32,
    /// Bytes of payload that follow.
    pub length: u32,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.operation.kind as u16).to_le_bytes());
        bytes[6..8].copy_from_slice(&self.hop.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.generation.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.operation.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.operation.total.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.offset.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// The header in `bytes`, or nothing if they are none.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        if u32_at(bytes, 0) != MAGIC {
            return None;
        }
        let kind = Kind::ALL.into_iter().find(|&kind| kind as u16 == u16_at(bytes, 4))?;
        Some(Self {
            operation: Operation { kind, sequence: u64_at(bytes, 16), total: u64_at(bytes, 24) },
            generation: Generation(u64_at(bytes, 8)),
            hop: u16_at(bytes, 6),
            offset: u32_at(bytes, 32),
            length: u32_at(bytes, 36),
        })
    }
}

/// In words, what came in place of `expected`.
pub(super) fn describe_mismatch(expected: &Header, came: &[u8; HEADER_BYTES]) -> String {
    match Header::decode(came) {
        None => "it sent bytes that are no frame".into(),
        Some(came) if came.generation != expected.generation => {
            format!("it is in generation {}, this rank in {}", came.generation, expected.generation)
        }
        Some(came) if came.operation != expected.operation => {
            format!("it is in {}, this rank in {}", came.operation, expected.operation)
        }
        Some(came) => format!(
            "it sent {} bytes at {} of block {} where {} bytes at {} of block {} were due",
            came.length, came.offset, came.hop, expected.length, expected.offset, expected.hop
        ),
    }
}

/// The little-endian number at `at`. `at` must leave room in `bytes`.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The little-endian number at `at`. `at` must leave room in `bytes`.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The little-endian number at `at`. `at` must leave room in `bytes`.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_the_wire() {
        let operation = Operation { kind: Kind::Gather, sequence: u64::MAX - 3, total: 1 << 40 };
        let header = Header { operation, generation: Generation(7), hop: 513, offset: u32::MAX, length: 9 };
        assert_eq!(Header::decode(&header.encode()), Some(header));
    }

    #[test]
    fn unknown_operation_and_foreign_magic_are_no_header() {
        let operation = Operation { kind: Kind::Sum, sequence: 1, total: 1 };
        let good = Header { operation, generation: Generation(0), hop: 0, offset: 0, length: 4 }.encode();
        for (at, value) in [(0, b'X'), (4, 99)] {
            let mut bad = good;
            bad[at] = value;
            assert_eq!(Header::decode(&bad), None);
        }
    }
}
