//! The volume as a vhost-user device sees it.

use super::{Volume, VolumeError};
use crate::vhost::Disk;
use bytes::Bytes;
use tokio::sync::watch;

impl Disk for Volume {
    type Error = VolumeError;

    fn size_bytes(&self) -> u64 {
        Volume::size_bytes(self)
    }
    fn sizes(&self) -> Option<watch::Receiver<u64>> {
        Some(Volume::sizes(self))
    }
    fn serial(&self) -> String {
        Volume::serial(self)
    }
    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, VolumeError> {
        Volume::read(self, offset, len).await
    }
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), VolumeError> {
        Volume::write(self, offset, data).await
    }
    async fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), VolumeError> {
        Volume::write_zeroes(self, offset, len, may_unmap).await
    }
    async fn trim(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        Volume::trim(self, offset, len).await
    }
    async fn settle(&self) {
        Volume::drain(self).await;
    }
    async fn flush(&self) -> Result<(), VolumeError> {
        Volume::flush(self).await
    }
}
