//! The tools for a stopped OSD: what they print, and how they end.

use crate::format;
use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};
use gabion_osd::store;
use gabion_osd::store::transfer::{self, Import, Totals};
use gabion_proto::ids::{ObjectId, OsdId, PgId};
use serde::Serialize;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    #[default]
    Text,
    Json,
}

#[derive(Subcommand)]
pub enum Offline {
    /// Checks a stopped OSD and changes nothing; exit status 1 when something is wrong.
    Fsck {
        /// Also reads every block and checks it against its checksum.
        #[arg(long)]
        deep: bool,
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
        data_dir: PathBuf,
    },
    /// Shows what a stopped OSD's disk is.
    Info {
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
        data_dir: PathBuf,
    },
    /// Shows everything that a stopped OSD knows of one object, or lists its groups and objects; changes nothing.
    Dump {
        /// The object, as VOLUME.INDEX.LAYER in hexadecimal; without it, all groups and objects are listed.
        object: Option<ObjectId>,
        #[arg(long)]
        data_dir: PathBuf,
        /// Lists groups and objects. The same as naming no object.
        #[arg(long, conflicts_with = "object")]
        list: bool,
        /// Only this group, as POOL.NUMBER with the number in hexadecimal.
        #[arg(long)]
        pg: Option<PgId>,
        /// Shows every block: its checksum, whether its bytes match, and where they are.
        #[arg(long, requires = "object")]
        blocks: bool,
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Copies one group of a stopped OSD to a file, to rescue it from a disk that is not served any more.
    Export {
        #[arg(long)]
        data_dir: PathBuf,
        /// The group, as POOL.NUMBER with the number in hexadecimal.
        #[arg(long)]
        pg: PgId,
        /// Marks the store first: it is not served any more, so that another disk can take its place.
        #[arg(long)]
        retire: bool,
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
        file: PathBuf,
    },
    /// Puts an exported group into the store of the same OSD, which is stopped: all of it or nothing.
    Import {
        #[arg(long)]
        data_dir: PathBuf,
        /// Makes a store that takes the place of this OSD's disk, where there is none yet.
        #[arg(long, value_name = "ID", value_parser = osd_id)]
        as_osd: Option<OsdId>,
        /// Size of that store, with K M G T (powers of 1024).
        #[arg(long, value_parser = size)]
        size: Option<u64>,
        /// The disk of the export is destroyed and will never be served again, though it was not exported with --retire.
        #[arg(long)]
        source_is_gone: bool,
        /// Removes what an import that did not finish has left.
        #[arg(long, conflicts_with_all = ["file", "as_osd", "size", "source_is_gone"])]
        abort: bool,
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
        #[arg(required_unless_present = "abort")]
        file: Option<PathBuf>,
    },
}

fn osd_id(text: &str) -> Result<OsdId, String> {
    let digits = text.strip_prefix("osd.").unwrap_or(text);
    digits.parse().map(OsdId).map_err(|_| format!("an OSD is a number, as 3 or osd.3, got {text:?}"))
}

fn size(text: &str) -> Result<u64, String> {
    format::parse_size(text).map_err(|e| format!("{e:#}"))
}

pub fn run(command: Offline) -> Result<ExitCode> {
    let mut out = BufWriter::new(io::stdout().lock());
    let done = match command {
        Offline::Fsck { deep, output, data_dir } => fsck(&mut out, &data_dir, deep, output),
        Offline::Info { output, data_dir } => info(&mut out, &data_dir, output),
        Offline::Dump { object: Some(object), data_dir, pg, blocks, output, .. } => {
            dump(&mut out, &data_dir, object, pg, blocks, output)
        }
        Offline::Dump { data_dir, pg, output, .. } => list(&mut out, &data_dir, pg, output),
        Offline::Export { data_dir, pg, retire, output, file } => {
            export(&mut out, &data_dir, pg, &file, retire, output)
        }
        Offline::Import { data_dir, as_osd, size, source_is_gone, output, file: Some(file), .. } => {
            let (data_dir, file) = (&data_dir, &file);
            import(&mut out, Import { data_dir, file, as_osd, size_bytes: size, source_is_gone }, output)
        }
        Offline::Import { data_dir, output, .. } => abort(&mut out, &data_dir, output),
    };
    let done = done.and_then(|code| Ok(out.flush().map(|()| code)?));
    match done {
        // Whoever reads has seen enough.
        Err(e) if e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
            Ok(ExitCode::SUCCESS)
        }
        done => done,
    }
}

fn json(out: &mut impl Write, value: &impl Serialize) -> Result<()> {
    serde_json::to_writer(&mut *out, value).map_err(io::Error::from)?;
    Ok(writeln!(out)?)
}

fn fsck(out: &mut impl Write, data_dir: &Path, deep: bool, output: Output) -> Result<ExitCode> {
    let report =
        store::fsck(data_dir, deep).with_context(|| format!("cannot check {}", data_dir.display()))?;
    match output {
        Output::Text => writeln!(out, "{report}")?,
        Output::Json => json(out, &report)?,
    }
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn info(out: &mut impl Write, data_dir: &Path, output: Output) -> Result<ExitCode> {
    #[derive(Serialize)]
    struct Shown {
        cluster: String,
        osd: u32,
        disk: String,
        format_version: u32,
        size_bytes: u64,
        journal_bytes: u64,
        chunks: u32,
    }
    let info = match store::info(data_dir) {
        Ok(info) => info,
        Err(e) => bail!("{}: {e}", data_dir.display()),
    };
    match output {
        Output::Text => writeln!(out, "{info}")?,
        Output::Json => json(
            out,
            &Shown {
                cluster: info.identity.cluster.to_string(),
                osd: info.identity.osd.0,
                disk: info.identity.disk.to_string(),
                format_version: info.format_version,
                size_bytes: info.size_bytes,
                journal_bytes: info.journal_bytes,
                chunks: info.chunks,
            },
        )?,
    }
    Ok(ExitCode::SUCCESS)
}

fn open(data_dir: &Path) -> Result<store::DirFrozen> {
    let opened = store::open_damaged(data_dir);
    let (store, damage) = opened.with_context(|| format!("cannot read {}", data_dir.display()))?;
    for why in damage {
        tracing::warn!(%why, "the OSD would not start with this store; what is shown may be of an earlier state");
    }
    Ok(store)
}

fn dump(
    out: &mut impl Write,
    data_dir: &Path,
    object: ObjectId,
    pg: Option<PgId>,
    blocks: bool,
    output: Output,
) -> Result<ExitCode> {
    #[derive(Serialize)]
    struct Shown {
        objects: Vec<store::ObjectDump>,
    }
    let objects = open(data_dir)?.dump(object, pg, blocks)?;
    if objects.is_empty() {
        let group = pg.map_or(String::new(), |pg| format!(" in group {pg}"));
        bail!("the store in {} knows nothing of object {object}{group}", data_dir.display());
    }
    match output {
        Output::Text => objects.iter().try_for_each(|o| write!(out, "{o}"))?,
        Output::Json => json(out, &Shown { objects })?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A group, which may have no object.
#[derive(Serialize)]
struct Group {
    pg: String,
    promised: u64,
    activated: u64,
    shard: Option<u8>,
}

/// The groups, then the objects, as they are read: there may be many.
fn list(out: &mut impl Write, data_dir: &Path, pg: Option<PgId>, output: Output) -> Result<ExitCode> {
    let mut store = open(data_dir)?;
    let metas = store.groups()?.into_iter().filter(|(id, _)| pg.is_none_or(|pg| pg == *id));
    let groups: Vec<Group> = metas
        .map(|(id, meta)| Group {
            pg: id.to_string(),
            promised: meta.promised.0,
            activated: meta.activated.0,
            shard: meta.shard.map(|s| s.number),
        })
        .collect();
    if output == Output::Text {
        for Group { pg, promised, activated, shard } in &groups {
            write!(out, "group {pg}: promised interval {promised}, activated in {activated}")?;
            match shard {
                Some(number) => writeln!(out, ", shard {number}")?,
                None => writeln!(out)?,
            }
        }
        store.list_objects(pg, |line| writeln!(out, "{line}").map_err(anyhow::Error::from))?;
        return Ok(ExitCode::SUCCESS);
    }
    write!(out, "{{\"groups\":")?;
    serde_json::to_writer(&mut *out, &groups).map_err(io::Error::from)?;
    write!(out, ",\"objects\":[")?;
    let mut first = true;
    store.list_objects(pg, |line| {
        if !std::mem::take(&mut first) {
            write!(out, ",")?;
        }
        serde_json::to_writer(&mut *out, &line).map_err(io::Error::from)?;
        Ok::<_, anyhow::Error>(())
    })?;
    writeln!(out, "]}}")?;
    Ok(ExitCode::SUCCESS)
}

/// What an export or an import carried over.
#[derive(Serialize)]
struct Carried {
    osd: u32,
    pg: String,
    objects: u64,
    missing: u64,
    data_blocks: u64,
    bad_blocks: u64,
}

impl Carried {
    fn of(osd: OsdId, pg: PgId, totals: Totals) -> Carried {
        let Totals { objects, missing, data_blocks, bad_blocks } = totals;
        Carried { osd: osd.0, pg: pg.to_string(), objects, missing, data_blocks, bad_blocks }
    }

    fn print(&self, out: &mut impl Write, output: Output, what: &str) -> Result<ExitCode> {
        if output == Output::Json {
            json(out, self)?;
            return Ok(ExitCode::SUCCESS);
        }
        let Carried { osd, pg, objects, missing, data_blocks, bad_blocks } = self;
        writeln!(
            out,
            "group {pg} of osd.{osd} {what}: {objects} objects, {missing} missing, {data_blocks} blocks of data"
        )?;
        if *bad_blocks > 0 {
            writeln!(
                out,
                "{bad_blocks} of the blocks are unreadable and stay so: other copies must repair them"
            )?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn export(
    out: &mut impl Write,
    data_dir: &Path,
    pg: PgId,
    file: &Path,
    retire: bool,
    output: Output,
) -> Result<ExitCode> {
    let (header, totals) = transfer::export(data_dir, pg, file, retire)
        .with_context(|| format!("cannot export group {pg} of {}", data_dir.display()))?;
    Carried::of(header.identity.osd, pg, totals).print(out, output, &format!("is in {}", file.display()))
}

fn import(out: &mut impl Write, wanted: Import<'_>, output: Output) -> Result<ExitCode> {
    let done = transfer::import(wanted).with_context(|| {
        format!("cannot import {} into {}", wanted.file.display(), wanted.data_dir.display())
    })?;
    let what = if done.already { "had been imported completely" } else { "is imported" };
    Carried::of(done.header.identity.osd, done.header.pg, done.totals).print(out, output, what)
}

fn abort(out: &mut impl Write, data_dir: &Path, output: Output) -> Result<ExitCode> {
    #[derive(Serialize)]
    struct Aborted {
        pg: Option<String>,
    }
    let pg = transfer::abort(data_dir).with_context(|| format!("cannot clean {}", data_dir.display()))?;
    match (output, pg) {
        (Output::Json, pg) => json(out, &Aborted { pg: pg.map(|pg| pg.to_string()) })?,
        (_, Some(pg)) => writeln!(out, "what was imported of group {pg} is removed")?,
        (_, None) => writeln!(out, "there is no unfinished import")?,
    }
    Ok(ExitCode::SUCCESS)
}
