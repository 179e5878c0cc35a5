//! A volume behind the device: sector-sized requests on a store of 4 KiB blocks.

mod vhost_frontend;

use gabion_gateway::vhost::serve;
use gabion_gateway::volume::Volume;
use vhost_frontend::*;

#[test]
fn sectors_of_a_volume_are_read_as_they_were_written() {
    let (rt, dir) = (runtime(), tempfile::tempdir().unwrap());
    let volume = rt.block_on(async { Volume::in_memory(64 << 20) });
    let socket = dir.path().join("v.sock");
    let export = serve(volume.clone(), socket.clone(), false, 2, rt.handle().clone()).unwrap();
    let mut guest = Guest::new(2);
    let front = guest.connect(&socket);

    let data: Vec<u8> = (0..20 * 512u32).map(|i| (i / 7) as u8).collect();
    // Neither end on a block's border, and across the border of two objects (4 MiB).
    let sector = (4 << 20) / 512 - 9;
    assert_eq!(guest.request(0, OUT, sector, &data, 0).0, OK);
    assert_eq!(guest.request(1, IN, sector, &[], data.len() as u32), (OK, data.clone()));
    assert_eq!(guest.request(1, IN, sector - 1, &[], 512), (OK, vec![0; 512]));
    assert_eq!(guest.request(0, WRITE_ZEROES, 0, &range(sector + 1, 17, 1), 0).0, OK);
    let mut expected = data;
    expected[512..18 * 512].fill(0);
    assert_eq!(guest.request(0, IN, sector, &[], expected.len() as u32), (OK, expected.clone()));
    assert_eq!(guest.request(0, FLUSH, 0, &[], 0).0, OK);
    let direct = rt.block_on(volume.read(sector * 512, expected.len() as u32)).unwrap();
    assert_eq!(direct, expected);
    drop(front);
    rt.block_on(export.stop());
}
