//! What a ring may do: what this driver asks of it, and nothing else.
//!
//! From the first submission on the kernel refuses any other operation with `EACCES`, whoever
//! submits it. So neither a fault of this process nor whoever takes it over can open files, make
//! sockets, or use registered descriptors or credentials through its rings.

use std::io;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{IoUring, opcode};

/// All operations that are submitted, multishot or not.
const OPERATIONS: [u8; 10] = [
    opcode::Accept::CODE,
    opcode::AsyncCancel::CODE,
    opcode::Close::CODE,
    opcode::Connect::CODE,
    opcode::PollAdd::CODE,
    opcode::Recv::CODE,
    opcode::Send::CODE,
    opcode::SendMsg::CODE,
    opcode::Timeout::CODE,
    opcode::TimeoutUpdate::CODE,
];
/// All flags that submissions have.
const FLAGS: Flags = Flags::BUFFER_SELECT.union(Flags::SKIP_SUCCESS);
/// `IORING_REGISTER_SYNC_CANCEL`, with which a ring ends. Buffers are registered before it is enabled.
const SYNC_CANCEL: u8 = 24;

/// Restricts a ring that was set up disabled, and enables it. To be called on the thread that uses it.
///
/// # Errors
/// Something between here and the kernel (which can do it since 5.10) denies it.
pub(super) fn enable_restricted(uring: &IoUring) -> io::Result<()> {
    let mut allowed: Vec<_> = OPERATIONS.map(Restriction::sqe_op).into();
    allowed.push(Restriction::sqe_flags_allowed(FLAGS.bits()));
    allowed.push(Restriction::register_op(SYNC_CANCEL));
    uring.submitter().register_restrictions(&mut allowed)?;
    uring.submitter().register_enable_rings()
}
