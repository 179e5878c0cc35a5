//! Byte-granular I/O against a plain vector, and what happens to the lock when callers leave.

use super::*;
use futures::future::BoxFuture;
use proptest::prelude::*;

const SIZE: u64 = 3 << 20;

fn small_volume(backend: MemoryBackend) -> Arc<Volume> {
    let shape = Shape { id: VolumeId(5), name: "t".into(), size_bytes: SIZE, object_bytes: 1 << 20 };
    Volume::new(shape, Box::new(backend))
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zeroes(u64, u64, bool),
    Trim(u64, u64),
    Read(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    // Around block and object borders as often as anywhere.
    let offset =
        prop_oneof![0..SIZE, (0..SIZE / BLOCK).prop_map(|b| b * BLOCK), (1020u64 << 10)..(1028 << 10)];
    let len = prop_oneof![1u64..9000, Just(4096u64), 1u64..(1300 << 10)];
    (offset, len, any::<u8>(), 0..5u8).prop_map(|(offset, len, fill, kind)| {
        let len = len.min(SIZE - offset);
        match kind {
            0 | 1 => Step::Write(offset, len, fill),
            2 => Step::Zeroes(offset, len, fill & 1 == 1),
            3 => Step::Trim(offset, len),
            _ => Step::Read(offset, len),
        }
    })
}

async fn run(steps: Vec<Step>) {
    let v = small_volume(MemoryBackend::default());
    let mut model = vec![0u8; SIZE as usize];
    for s in steps {
        match s {
            Step::Write(o, l, fill) => {
                let data: Vec<u8> = (0..l).map(|i| fill.wrapping_add((i % 251) as u8)).collect();
                model[o as usize..(o + l) as usize].copy_from_slice(&data);
                v.write(o, data.into()).await.unwrap();
            }
            Step::Zeroes(o, l, unmap) => {
                model[o as usize..(o + l) as usize].fill(0);
                v.write_zeroes(o, l, unmap).await.unwrap();
            }
            Step::Trim(o, l) => {
                let whole = blocks_inside(o, l);
                model[(whole.start * BLOCK) as usize..(whole.end * BLOCK) as usize].fill(0);
                v.trim(o, l).await.unwrap();
            }
            Step::Read(o, l) => {
                assert!(v.read(o, l as u32).await.unwrap() == model[o as usize..(o + l) as usize]);
            }
        }
    }
    assert!(v.read(0, SIZE as u32).await.unwrap() == model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn behaves_like_a_vector(steps in prop::collection::vec(step(), 1..25)) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(run(steps));
    }
}

#[tokio::test]
async fn parts_of_one_block_written_at_once_all_arrive() {
    let v = small_volume(MemoryBackend::default());
    let writes = (0..64u64).map(|i| {
        let v = v.clone();
        tokio::spawn(async move { v.write(i * 200, Bytes::from(vec![i as u8 + 1; 200])).await })
    });
    for w in writes.collect::<Vec<_>>() {
        w.await.unwrap().unwrap();
    }
    let all = v.read(0, 64 * 200).await.unwrap();
    for (i, part) in all.chunks(200).enumerate() {
        assert!(part.iter().all(|b| *b == i as u8 + 1), "part {i}");
    }
}

#[tokio::test]
async fn a_caller_that_leaves_does_not_stop_its_write() {
    let v = small_volume(MemoryBackend::default());
    {
        let mut write = std::pin::pin!(v.write(0, Bytes::from(vec![7u8; 8192])));
        assert!(futures::poll!(&mut write).is_pending());
    }
    v.drain().await;
    assert!(v.read(0, 8192).await.unwrap().iter().all(|b| *b == 7));
}

#[tokio::test]
async fn limits_and_fences() {
    let backend = MemoryBackend::default();
    backend.fence();
    let v = small_volume(backend);
    let out = |r: Result<(), VolumeError>| matches!(r, Err(VolumeError::OutOfRange { .. }));
    assert!(out(v.write(SIZE - 1, Bytes::from_static(b"ab")).await));
    assert!(out(v.trim(u64::MAX, 2).await));
    assert!(out(v.write_zeroes(0, SIZE + 1, true).await));
    assert!(out(v.read(SIZE, 1).await.map(drop)));
    assert_eq!(v.read(SIZE, 0).await, Ok(Bytes::new()));
    assert_eq!(v.write(0, Bytes::from_static(b"a")).await, Err(VolumeError::Fenced));
    assert_eq!(v.flush().await, Err(VolumeError::Fenced));
}

#[tokio::test]
async fn trimmed_space_comes_back() {
    let backend = Arc::new(MemoryBackend::default());
    struct Shared(Arc<MemoryBackend>);
    impl Backend for Shared {
        fn read(&self, o: u32, f: u32, n: u32) -> BoxFuture<'_, Result<Content, VolumeError>> {
            self.0.read(o, f, n)
        }
        fn write(&self, o: u32, c: Content) -> BoxFuture<'_, Result<(), VolumeError>> {
            self.0.write(o, c)
        }
        fn zero(&self, o: u32, f: u32, n: u32, d: bool) -> BoxFuture<'_, Result<(), VolumeError>> {
            self.0.zero(o, f, n, d)
        }
        fn check(&self) -> Result<(), VolumeError> {
            self.0.check()
        }
    }
    let shape = Shape { id: VolumeId(5), name: "t".into(), size_bytes: SIZE, object_bytes: 1 << 20 };
    let v = Volume::new(shape, Box::new(Shared(backend.clone())));
    v.write(100, Bytes::from(vec![1u8; 3 * 4096])).await.unwrap();
    assert_eq!(backend.block_count(), 4);
    v.trim(100, 3 * 4096).await.unwrap();
    assert_eq!(backend.block_count(), 2, "the partial edges stay");
    assert!(v.read(4096, 8192).await.unwrap().iter().all(|b| *b == 0));
}

/// Writes of object 0 wait while it is held.
struct Waits(MemoryBackend, watch::Receiver<bool>);

impl Backend for Waits {
    fn read(&self, o: u32, f: u32, n: u32) -> BoxFuture<'_, Result<Content, VolumeError>> {
        self.0.read(o, f, n)
    }
    fn write(&self, o: u32, c: Content) -> BoxFuture<'_, Result<(), VolumeError>> {
        Box::pin(async move {
            if o == 0 {
                self.1.clone().wait_for(|held| !held).await.map_err(|_| VolumeError::Io)?;
            }
            self.0.write(o, c).await
        })
    }
    fn zero(&self, o: u32, f: u32, n: u32, d: bool) -> BoxFuture<'_, Result<(), VolumeError>> {
        self.0.zero(o, f, n, d)
    }
    fn check(&self) -> Result<(), VolumeError> {
        self.0.check()
    }
}

#[tokio::test]
async fn zeroes_do_not_pass_a_write_that_waits_for_room() {
    let (hold, held) = watch::channel(true);
    let object_bytes = 16 << 20;
    let shape =
        Shape { id: VolumeId(5), name: "t".into(), size_bytes: 2 * u64::from(object_bytes), object_bytes };
    let v = Volume::new(shape, Box::new(Waits(MemoryBackend::default(), held)));
    let at = u64::from(object_bytes);
    let begin = |offset, data: Bytes| {
        let v = v.clone();
        tokio::spawn(async move { v.write(offset, data).await })
    };
    let much = Bytes::from(vec![1u8; object_bytes as usize]);
    let mut writes: Vec<_> = (0..WRITE_BYTES_MAX / much.len()).map(|_| begin(0, much.clone())).collect();
    writes.push(begin(at, Bytes::from(vec![7u8; 8192])));
    // On one thread they have all come to where they wait.
    tokio::task::yield_now().await;
    let zeroed = v.clone();
    writes.push(tokio::spawn(async move { zeroed.write_zeroes(at, 4096, true).await }));
    let trimmed = v.clone();
    writes.push(tokio::spawn(async move { trimmed.trim(at + 4096, 4096).await }));
    // Long enough for both, if nothing kept them.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    hold.send_replace(false);
    for write in writes {
        write.await.unwrap().unwrap();
    }
    assert!(v.read(at, 8192).await.unwrap().iter().all(|b| *b == 0));
}
