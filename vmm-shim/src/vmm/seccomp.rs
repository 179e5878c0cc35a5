//! Which system calls each kind of thread may make. A thread that makes another ends the process with a
//! line that names the call. Threads inherit the filters of the thread that starts them, so the main
//! thread's list holds those of the disks' threads, which it starts when a disk is attached.

use super::net::tap::TUNSETOFFLOAD;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use std::collections::BTreeMap;
use std::sync::Once;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    Main,
    Vcpu,
    Disk,
    Net,
}

#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("the system call filter of {0:?} threads cannot be built")]
    Build(Thread, #[source] seccompiler::BackendError),
    #[error("the kernel does not take the system call filter of {0:?} threads")]
    Apply(Thread, #[source] seccompiler::Error),
}

/// What the runtime needs in any thread: memory, locks, signals, logging, ending.
const COMMON: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Besides running the guest a vCPU writes the console when its buffer is full.
const VCPU: &[libc::c_long] = &[libc::SYS_eventfd2, libc::SYS_ftruncate, libc::SYS_sendto];

/// The vhost-user socket.
const DISK: &[libc::c_long] = &[
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_eventfd2,
    libc::SYS_fstat,
    libc::SYS_getsockopt,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_socket,
    libc::SYS_prctl,
    libc::SYS_seccomp,
    libc::SYS_sched_getaffinity,
];

/// Frames are read and written; offloads are set by `ioctl`.
const NET: &[libc::c_long] = &[libc::SYS_poll, libc::SYS_ppoll];

/// Control and console sockets, the record of the end, and starting disks' threads.
const MAIN: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_ioctl,
    libc::SYS_lseek,
    libc::SYS_mprotect,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_rename,
    libc::SYS_statx,
    libc::SYS_unlink,
];

fn list(thread: Thread) -> Vec<libc::c_long> {
    let own: &[&[libc::c_long]] = match thread {
        Thread::Vcpu => &[VCPU],
        Thread::Disk => &[DISK],
        // These start before the main thread is under its filter.
        Thread::Net => &[NET],
        Thread::Main => &[DISK, MAIN],
    };
    own.iter().copied().chain([COMMON]).flatten().copied().collect()
}

/// `ioctl`s that a vCPU makes: run, and what moving a card's interrupts and doorbells needs.
fn vcpu_ioctls() -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    const KVM_RUN: u64 = 0xae80;
    const KVM_IRQ_LINE: u64 = 0x4008_ae61;
    const KVM_SET_GSI_ROUTING: u64 = 0x4008_ae6a;
    const KVM_IRQFD: u64 = 0x4020_ae76;
    const KVM_IOEVENTFD: u64 = 0x4040_ae79;
    ioctls(&[KVM_RUN, KVM_IRQ_LINE, KVM_SET_GSI_ROUTING, KVM_IRQFD, KVM_IOEVENTFD, libc::FIONBIO])
}

fn ioctls(requests: &[u64]) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    requests
        .iter()
        .map(|request| {
            SeccompRule::new(vec![SeccompCondition::new(
                1,
                SeccompCmpArgLen::Dword,
                SeccompCmpOp::Eq,
                *request,
            )?])
        })
        .collect()
}

fn program(thread: Thread) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        list(thread).into_iter().map(|call| (call, Vec::new())).collect();
    match thread {
        Thread::Vcpu => drop(rules.insert(libc::SYS_ioctl, vcpu_ioctls()?)),
        Thread::Net => drop(rules.insert(libc::SYS_ioctl, ioctls(&[TUNSETOFFLOAD])?)),
        Thread::Main | Thread::Disk => {}
    }
    SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Puts the calling thread under its filter, for good.
pub fn restrict(thread: Thread) -> Result<(), SeccompError> {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(name_refused_calls);
    let program = program(thread).map_err(|e| SeccompError::Build(thread, e))?;
    seccompiler::apply_filter(&program).map_err(|e| SeccompError::Apply(thread, e))
}

/// A refused call ends the process, saying which it was.
fn name_refused_calls() {
    extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        /// `siginfo_t` of SIGSYS: signo, errno, code, padding, then the call's address and its number.
        const CALL_NUMBER_AT: usize = 24;
        // SAFETY: the kernel passes a siginfo_t of at least 128 bytes to a SA_SIGINFO handler.
        let call = unsafe { info.cast::<u8>().add(CALL_NUMBER_AT).cast::<i32>().read_unaligned() };
        let mut text = *b"seccomp: system call      is not allowed\n";
        let (mut rest, mut at) = (call.unsigned_abs(), 24);
        while rest > 0 && at > 20 {
            text[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            at -= 1;
        }
        // SAFETY: both calls are safe in signal handlers; the buffer is on this stack.
        unsafe {
            libc::write(2, text.as_ptr().cast(), text.len());
            libc::_exit(REFUSED_EXIT_CODE);
        }
    }
    // SAFETY: the action is fully initialised, its handler only uses async-signal-safe calls.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = refused as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut());
    }
}

pub const REFUSED_EXIT_CODE: i32 = 159;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_filter_compiles_and_the_main_threads_holds_the_disks() {
        for thread in [Thread::Main, Thread::Vcpu, Thread::Disk, Thread::Net] {
            assert!(!program(thread).unwrap().is_empty());
        }
        let main = list(Thread::Main);
        assert!(list(Thread::Disk).iter().all(|call| main.contains(call)));
        assert!(!list(Thread::Vcpu).contains(&libc::SYS_openat), "a vCPU opens nothing");
        assert!(!list(Thread::Main).contains(&libc::SYS_execve), "nobody runs programs");
    }

    /// Runs itself: the child makes a call that vCPUs may not make.
    #[test]
    fn a_refused_call_ends_the_process_and_is_named() {
        const CHILD: &str = "GABION_TEST_SECCOMP_CHILD";
        if std::env::var_os(CHILD).is_some() {
            restrict(Thread::Vcpu).unwrap();
            let _ = std::fs::File::open("/dev/null");
            unreachable!("the call was not refused");
        }
        let name = "vmm::seccomp::tests::a_refused_call_ends_the_process_and_is_named";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(REFUSED_EXIT_CODE));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            text.contains(&format!("seccomp: system call  {} is not allowed", libc::SYS_openat)),
            "{text}"
        );
    }
}
