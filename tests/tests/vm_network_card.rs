//! The VMM's network card, without a guest: frames go both ways whole and in order, and what a driver makes
//! wrongly costs a frame or the queue, never the card.

use anyhow::{Context, Result, ensure};
use gabion_proto::nic::MacAddress;
use gabion_tests::guest_driver::{BUFFERS, Buffer, Driver, QUEUE_SIZE, Virtqueue, guest_memory};
use gabion_vmm_shim::vmm::net::tap::{HEADER_BYTES, Tap};
use gabion_vmm_shim::vmm::net::{PCI_CLASS, VIRTIO_NET, VirtioNet};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

const MAC: &str = "02:00:5e:10:00:01";
const SLOT_BYTES: usize = 0x1000;
const FRAMES: u32 = 3000;
/// On their way at once: fewer than a datagram socket holds (net.unix.max_dgram_qlen, 10).
const WIRE_FRAMES: u32 = 8;

fn card() -> Result<(Driver, UnixDatagram)> {
    let (peer, end) = UnixDatagram::pair()?;
    end.set_nonblocking(true)?;
    // A frame that does not come fails the test instead of hanging it.
    peer.set_read_timeout(Some(Duration::from_secs(60)))?;
    let memory = guest_memory()?;
    let mac: MacAddress = MAC.parse().map_err(anyhow::Error::msg)?;
    let device = VirtioNet::new(Tap::from_datagrams(end.into()), mac, memory.clone())?;
    Ok((Driver::new(VIRTIO_NET, PCI_CLASS, Box::new(device), memory)?, peer))
}

/// A frame with its header: of changing length, different in every byte from its neighbours.
fn frame(n: u32) -> Vec<u8> {
    let len = 14 + n as usize * 7919 % 1500;
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend((0..len).map(|i| (n as usize * 31 + i * 7) as u8));
    frame
}

fn slot(queue: &Virtqueue, head: u16) -> u64 {
    BUFFERS + u64::from(queue.index * QUEUE_SIZE + head) * SLOT_BYTES as u64
}

/// Offers a buffer for a received frame, in two parts, the first as long as the header or shorter.
fn offer_room(queue: &mut Virtqueue, head: u16, first: usize, bytes: usize) -> Result<()> {
    let at = slot(queue, head);
    let second = Buffer { at: at + first as u64, len: bytes - first, device_writes: true };
    queue.offer(head, &[Buffer { at, len: first, device_writes: true }, second])
}

/// Offers a frame in two parts.
fn send(queue: &mut Virtqueue, head: u16, frame: &[u8]) -> Result<()> {
    let at = slot(queue, head);
    queue.memory.write_slice(frame, GuestAddress(at))?;
    let first = 5 + usize::from(head) % HEADER_BYTES;
    let second = Buffer { at: at + first as u64, len: frame.len() - first, device_writes: false };
    queue.offer(head, &[Buffer { at, len: first, device_writes: false }, second])
}

fn received(queue: &mut Virtqueue) -> Result<(u16, Vec<u8>)> {
    let (head, bytes) = queue.answer()?;
    let mut frame = vec![0; bytes as usize];
    queue.memory.read_slice(&mut frame, GuestAddress(slot(queue, head)))?;
    Ok((head, frame))
}

fn next(peer: &UnixDatagram) -> Result<Vec<u8>> {
    let mut buffer = vec![0; 1 << 17];
    let len = peer.recv(&mut buffer).context("the frame that was sent")?;
    buffer.truncate(len);
    Ok(buffer)
}

#[test]
fn frames_go_both_ways_whole_and_in_order() -> Result<()> {
    let (mut driver, peer) = card()?;
    assert_eq!(driver.config(8), [2, 0, 0x5e, 0x10, 0, 1, 0, 0]);
    let [mut receive, mut transmit] = driver.start(1 << 5, 2)?.try_into().ok().context("two queues")?;

    let sender = peer.try_clone()?;
    let from_wire = std::thread::spawn(move || -> Result<()> {
        for n in 0..FRAMES {
            sender.send(&frame(n))?;
        }
        Ok(())
    });
    // A card loses what its wire has no room for, and this wire has room for few.
    let (taken, room) = std::sync::mpsc::channel();
    let to_wire = std::thread::spawn(move || -> Result<()> {
        for n in 0..FRAMES {
            ensure!(next(&peer)? == frame(n), "frame {n} went out otherwise");
            let _ = taken.send(());
        }
        Ok(())
    });
    let transmitter = std::thread::spawn(move || -> Result<()> {
        for n in 0..FRAMES {
            if n >= WIRE_FRAMES {
                room.recv().context("frames are taken from the wire")?;
            }
            if n >= u32::from(QUEUE_SIZE) / 2 {
                transmit.answer()?;
            }
            send(&mut transmit, (n * 2 % u32::from(QUEUE_SIZE)) as u16, &frame(n))?;
        }
        Ok(())
    });
    // The first frames wait for room.
    for head in (0..QUEUE_SIZE).step_by(2) {
        offer_room(&mut receive, head, HEADER_BYTES, SLOT_BYTES)?;
    }
    for n in 0..FRAMES {
        let (head, found) = received(&mut receive)?;
        let mut expected = frame(n);
        // As many buffers as the frame is in.
        expected[10] = 1;
        ensure!(found == expected, "frame {n} came in otherwise");
        offer_room(&mut receive, head, HEADER_BYTES, SLOT_BYTES)?;
    }
    for thread in [from_wire, to_wire, transmitter] {
        thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(())
}

#[test]
fn what_a_driver_makes_wrongly_costs_a_frame_or_the_queue_and_a_reset_mends_it() -> Result<()> {
    let (mut driver, peer) = card()?;
    let [mut receive, mut transmit] = driver.start(1 << 5, 2)?.try_into().ok().context("two queues")?;

    // Frames that cannot be sent: without content, beyond the memory, longer than any, to be written by the device.
    let buffer = |at, len| Buffer { at, len, device_writes: false };
    let here = slot(&transmit, 0);
    let wrong = [
        buffer(here, HEADER_BYTES),
        buffer(u64::MAX - 4, 100),
        buffer(here, 1 << 20),
        Buffer { device_writes: true, ..buffer(here, 100) },
    ];
    for (head, buffer) in (0..).zip(wrong) {
        transmit.offer(head, &[buffer])?;
        assert_eq!(transmit.answer()?, (head, 0));
    }
    send(&mut transmit, 8, &frame(1))?;
    assert_eq!(transmit.answer()?.0, 8);
    assert_eq!(next(&peer)?, frame(1), "nothing else went out");

    // A frame for which the room is too small is lost; so is one for a buffer that the device may only read.
    offer_room(&mut receive, 0, 4, 20)?;
    peer.send(&frame(2))?;
    assert_eq!(receive.answer()?, (0, 0));
    receive.offer(2, &[buffer(slot(&receive, 2), 2000)])?;
    peer.send(&frame(3))?;
    assert_eq!(receive.answer()?, (2, 0));
    offer_room(&mut receive, 4, 4, SLOT_BYTES)?;
    peer.send(&frame(4))?;
    assert_eq!(received(&mut receive)?.1[HEADER_BYTES..], frame(4)[HEADER_BYTES..]);

    // More available than the ring has: nothing more is sent before a reset.
    transmit.advance(QUEUE_SIZE + 1)?;
    transmit.ring()?;
    driver.reset()?;
    let [mut receive, mut transmit] = driver.start(1 << 5, 2)?.try_into().ok().context("two queues")?;
    offer_room(&mut receive, 0, HEADER_BYTES, SLOT_BYTES)?;
    peer.send(&frame(5))?;
    assert_eq!(received(&mut receive)?.1[HEADER_BYTES..], frame(5)[HEADER_BYTES..]);
    send(&mut transmit, 0, &frame(6))?;
    assert_eq!(next(&peer)?, frame(6));
    Ok(())
}
