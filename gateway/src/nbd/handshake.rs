//! Fixed newstyle negotiation: from the first byte to the choice of an export.
//!
//! Answered: EXPORT_NAME, ABORT, LIST, INFO, GO. Every other option, among them STARTTLS and
//! STRUCTURED_REPLY, is answered as unsupported and the client goes on without.

use super::limits::*;
use super::wire::*;
use super::{Export, Names, NbdError};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Negotiates. `None`: the client left in order.
pub async fn negotiate<S>(stream: &mut S, names: &Names) -> Result<Option<Arc<Export>>, NbdError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut greeting = Vec::with_capacity(18);
    greeting.extend(NBDMAGIC.to_be_bytes());
    greeting.extend(IHAVEOPT.to_be_bytes());
    greeting.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting).await?;

    let flags = stream.read_u32().await?;
    let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    if flags & !known != 0 {
        return Err(NbdError::Protocol(format!("unknown client flags {flags:#x}")));
    }
    let no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;

    for _ in 0..OPTIONS_MAX {
        let magic = stream.read_u64().await?;
        if magic != IHAVEOPT {
            return Err(NbdError::Protocol(format!("bad option magic {magic:#x}")));
        }
        let option = stream.read_u32().await?;
        let len = stream.read_u32().await?;
        if len > OPTION_BYTES_MAX {
            skip(stream, len).await?;
            if option == option::EXPORT_NAME {
                return Err(NbdError::Protocol("an export name over the limit".into()));
            }
            answer(stream, option, reply::ERR_TOO_BIG, b"option data over the limit").await?;
            continue;
        }
        let mut data = vec![0u8; len as usize];
        stream.read_exact(&mut data).await?;
        match option {
            option::EXPORT_NAME => return export_name(stream, names, &data, no_zeroes).await.map(Some),
            option::ABORT => {
                // The client may be gone already.
                let _ = answer(stream, option, reply::ACK, &[]).await;
                return Ok(None);
            }
            option::LIST => list(stream, names, &data).await?,
            option::INFO | option::GO => {
                if let Some(export) = info(stream, names, option, &data).await?
                    && option == option::GO
                {
                    return Ok(Some(export));
                }
            }
            _ => answer(stream, option, reply::ERR_UNSUP, b"option not supported").await?,
        }
    }
    Err(NbdError::Protocol(format!("more than {OPTIONS_MAX} options")))
}

async fn skip<S: AsyncRead + Unpin>(stream: &mut S, len: u32) -> Result<(), NbdError> {
    if len > OPTION_SKIP_BYTES_MAX {
        return Err(NbdError::Protocol(format!("an option of {len} bytes")));
    }
    let skipped = tokio::io::copy(&mut stream.take(len.into()), &mut tokio::io::sink()).await?;
    if skipped < u64::from(len) {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    Ok(())
}

async fn answer<S: AsyncWrite + Unpin>(
    stream: &mut S,
    option: u32,
    kind: u32,
    data: &[u8],
) -> Result<(), NbdError> {
    let mut out = Vec::with_capacity(20 + data.len());
    out.extend(REPLY_OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    stream.write_all(&out).await?;
    Ok(())
}

/// The old way in: there is no way to refuse but to close.
async fn export_name<S: AsyncWrite + Unpin>(
    stream: &mut S,
    names: &Names,
    name: &[u8],
    no_zeroes: bool,
) -> Result<Arc<Export>, NbdError> {
    let name = String::from_utf8_lossy(name);
    let export = names.find(&name).ok_or_else(|| NbdError::NoExport(name.into_owned()))?;
    let mut out = Vec::with_capacity(134);
    out.extend(export.volume.size_bytes().to_be_bytes());
    out.extend(export.flags().to_be_bytes());
    if !no_zeroes {
        out.extend([0u8; 124]);
    }
    stream.write_all(&out).await?;
    Ok(export)
}

async fn list<S: AsyncWrite + Unpin>(stream: &mut S, names: &Names, data: &[u8]) -> Result<(), NbdError> {
    if !data.is_empty() {
        return answer(stream, option::LIST, reply::ERR_INVALID, b"LIST takes no data").await;
    }
    for name in names.list() {
        let mut entry = (name.len() as u32).to_be_bytes().to_vec();
        entry.extend(name.as_bytes());
        answer(stream, option::LIST, reply::SERVER, &entry).await?;
    }
    answer(stream, option::LIST, reply::ACK, &[]).await
}

/// Answers INFO and GO; the export when that succeeded.
async fn info<S: AsyncWrite + Unpin>(
    stream: &mut S,
    names: &Names,
    option: u32,
    data: &[u8],
) -> Result<Option<Arc<Export>>, NbdError> {
    let Some((name, wanted)) = parse_info(data) else {
        answer(stream, option, reply::ERR_INVALID, b"malformed request").await?;
        return Ok(None);
    };
    let Some(export) = names.find(name) else {
        answer(stream, option, reply::ERR_UNKNOWN, b"no such export").await?;
        return Ok(None);
    };
    let mut entry = info::EXPORT.to_be_bytes().to_vec();
    entry.extend(export.volume.size_bytes().to_be_bytes());
    entry.extend(export.flags().to_be_bytes());
    answer(stream, option, reply::INFO, &entry).await?;

    let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [1, crate::volume::Volume::block_bytes(), REQUEST_BYTES_MAX] {
        sizes.extend(size.to_be_bytes());
    }
    answer(stream, option, reply::INFO, &sizes).await?;
    if wanted.contains(&info::NAME) {
        let mut entry = info::NAME.to_be_bytes().to_vec();
        entry.extend(name.as_bytes());
        answer(stream, option, reply::INFO, &entry).await?;
    }
    answer(stream, option, reply::ACK, &[]).await?;
    Ok(Some(export))
}

/// Name and wanted kinds of information; `None` when the lengths do not add up.
fn parse_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let len = u32::from_be_bytes(*len) as usize;
    if len > NAME_BYTES_MAX || len > rest.len() {
        return None;
    }
    let (name, rest) = rest.split_at(len);
    let (count, rest) = rest.split_first_chunk::<2>()?;
    if rest.len() != usize::from(u16::from_be_bytes(*count)) * 2 {
        return None;
    }
    let wanted = rest.chunks_exact(2).map(|c| u16::from_be_bytes([c[0], c[1]])).collect();
    Some((std::str::from_utf8(name).ok()?, wanted))
}
