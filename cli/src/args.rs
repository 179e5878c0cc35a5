//! Every noun, verb and flag. Completions come from here too.

use crate::output::Format;
use crate::size;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use gabion_common::tls::Role;
use gabion_proto::limits::{valid_name, valid_volume_name};
use gabion_proto::nic::NicSpec;
use std::path::PathBuf;

#[derive(Parser, Debug)]
#[command(
    name = "gabion",
    version,
    about = "Replicated block storage for virtual machines",
    propagate_version = true
)]
pub struct Cli {
    /// Monitors, as `ip:port` or `ip:port,ip:port`; else the config file names them.
    #[arg(long, global = true, env = "GABION_MONITORS", value_delimiter = ',', value_name = "ADDR")]
    pub monitors: Vec<String>,
    /// The cluster's CA (PEM), for a cluster with TLS; else the config file names it.
    #[arg(long, global = true, env = "GABION_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// The certificate to show (PEM).
    #[arg(long, global = true, env = "GABION_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, global = true, env = "GABION_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// How answers are printed.
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    pub output: Format,
    /// No colours (also NO_COLOR).
    #[arg(long, global = true)]
    pub no_color: bool,
    /// Do not ask before destroying something.
    #[arg(short, long, global = true)]
    pub yes: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// A whole cluster of real daemons on this machine
    Dev {
        #[command(subcommand)]
        verb: DevVerb,
    },
    /// The cluster on one screen
    Status,
    /// Each problem and its remedy
    Health,
    /// What happened
    Events {
        /// Go on with new events.
        #[arg(long, short)]
        follow: bool,
        /// How many past events.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        last: u32,
    },
    /// The daemons that keep the cluster's map and configuration
    Monitor {
        #[command(subcommand)]
        verb: MonitorVerb,
    },
    /// Storage daemons
    Osd {
        #[command(subcommand)]
        verb: OsdVerb,
    },
    /// Pools: how volumes are kept
    Pool {
        #[command(subcommand)]
        verb: PoolVerb,
    },
    /// Placement groups
    Pg {
        #[command(subcommand)]
        verb: PgVerb,
    },
    /// Volumes
    Volume {
        #[command(subcommand)]
        verb: VolumeVerb,
    },
    /// Snapshots of volumes, named VOLUME@NAME
    Snapshot {
        #[command(subcommand)]
        verb: SnapshotVerb,
    },
    /// Volumes served over NBD or vhost-user
    Export {
        #[command(subcommand)]
        verb: ExportVerb,
    },
    /// Hosts with a gateway or an agent
    Host {
        #[command(subcommand)]
        verb: HostVerb,
    },
    /// Virtual machines
    Vm {
        #[command(subcommand)]
        verb: VmVerb,
    },
    /// Repair after a failure
    Rebuild {
        #[command(subcommand)]
        verb: RebuildVerb,
    },
    /// Comparing copies and reading what nobody reads
    Scrub {
        #[command(subcommand)]
        verb: ScrubVerb,
    },
    /// The cluster's certificate authority: files, used offline
    Ca {
        #[command(subcommand)]
        verb: CaVerb,
    },
    /// Prints a completion script
    Completions { shell: Shell },
    /// Writes the manual pages into a directory
    #[command(hide = true)]
    Manual { dir: PathBuf },
}

#[derive(Args, Debug, Clone)]
pub struct DevDir {
    /// Directory of the cluster.
    #[arg(long, default_value = ".gabion")]
    pub dir: PathBuf,
}

#[derive(Subcommand, Debug)]
pub enum DevVerb {
    /// Starts the cluster and waits until it serves; does nothing when it runs
    #[command(after_help = "Here --monitors N is the number of monitors to run: 1 (the default), 3 or 5.")]
    Up {
        #[command(flatten)]
        dir: DevDir,
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
        osds: u32,
        /// Simulated hosts that the OSDs claim; default: one per OSD, at most 4.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
        hosts: Option<u32>,
        /// Size of each OSD's file, written whole at the start.
        #[arg(long, default_value = "2G", value_parser = size::parse)]
        osd_size: u64,
        /// Daemons that die stay down.
        #[arg(long)]
        no_restart: bool,
        /// After how long a down OSD is out.
        #[arg(long)]
        down_out_secs: Option<u64>,
        /// TLS between all daemons and the command, by a CA that is made in the directory.
        #[arg(long)]
        tls: bool,
        /// How long to wait for the cluster.
        #[arg(long, default_value_t = 90)]
        timeout_secs: u64,
    },
    /// Stops every daemon
    Down {
        #[command(flatten)]
        dir: DevDir,
        /// Also removes the directory with all data.
        #[arg(long)]
        wipe: bool,
    },
    /// Lists the daemons
    Status {
        #[command(flatten)]
        dir: DevDir,
    },
    /// Starts a daemon that is down
    Start {
        #[command(flatten)]
        dir: DevDir,
        /// KIND.ID as in dev status, such as osd.1.
        daemon: String,
    },
    /// Stops a daemon cleanly; it stays down
    Stop {
        #[command(flatten)]
        dir: DevDir,
        daemon: String,
    },
    /// Kills a daemon (SIGKILL); it is restarted unless --stay-down or the cluster has --no-restart
    Kill {
        #[command(flatten)]
        dir: DevDir,
        daemon: String,
        #[arg(long)]
        stay_down: bool,
    },
    #[command(hide = true)]
    Supervise {
        #[command(flatten)]
        dir: DevDir,
    },
}

#[derive(Subcommand, Debug)]
pub enum CaVerb {
    /// Makes a CA: DIR/ca.crt and DIR/ca.key
    Create {
        #[arg(default_value = "ca")]
        dir: PathBuf,
        /// The cluster's name, in every certificate.
        #[arg(long, default_value = "gabion")]
        cluster: String,
        /// How long the CA is valid.
        #[arg(long, default_value_t = 7300, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
    },
    /// Makes a key and a certificate: OUT/ROLE.crt and OUT/ROLE.key, with ca.crt beside them
    Issue {
        /// monitor, osd, gateway or host: a daemon; admin: an operator; viewer: a program that only watches.
        role: Role,
        /// For people: the node, or who operates.
        name: String,
        /// Directory of the CA.
        #[arg(long, default_value = "ca")]
        ca: PathBuf,
        /// Address of the daemon, for clients that are not Gabion's; may be repeated.
        #[arg(long = "address", value_name = "IP")]
        addresses: Vec<std::net::IpAddr>,
        /// Where the files go.
        #[arg(long, default_value = ".")]
        out: PathBuf,
        /// Another stem for the files than the role.
        #[arg(long)]
        file: Option<String>,
        /// How long the certificate is valid.
        #[arg(long, default_value_t = 1825, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
        /// Replace the certificate and the key that are there.
        #[arg(long)]
        renew: bool,
    },
}

#[derive(Subcommand, Debug)]
pub enum MonitorVerb {
    /// Lists monitors
    Ls,
    /// Makes the empty monitor at this address (gabion-monitor --join) part of the cluster
    Add {
        /// ip:port
        addr: std::net::SocketAddr,
    },
    /// Takes a monitor out, also one that is down; its data is of no use afterwards
    Rm { id: MonitorId },
}

/// `3` or `monitor.3`.
#[derive(Clone, Copy, Debug)]
pub struct MonitorId(pub u64);

impl std::str::FromStr for MonitorId {
    type Err = String;
    fn from_str(text: &str) -> Result<MonitorId, String> {
        let digits = text.strip_prefix("monitor.").unwrap_or(text);
        digits
            .parse()
            .map(MonitorId)
            .map_err(|_| format!("{text:?} is not a monitor: use its number, as 3 or monitor.3"))
    }
}

#[derive(Subcommand, Debug)]
pub enum OsdVerb {
    /// Lists OSDs
    Ls,
    /// OSDs by rack and host
    Tree,
    /// One OSD
    Show { id: OsdId },
    /// Moves its data elsewhere
    Out { id: OsdId },
    /// Lets it hold data again
    In { id: OsdId },
    /// Sets its share of data; 1.0 is one unit
    Reweight {
        id: OsdId,
        #[arg(value_parser = parse_weight)]
        weight: u32,
    },
    /// What is done about OSDs that answer much slower than the others, and which do
    SlowPolicy {
        /// Take one out when it has been slow for so long, as 10m or 1h, at least 60s; 0: never, only warn.
        #[arg(long, value_parser = parse_seconds, value_name = "TIME")]
        evict_after: Option<u64>,
        /// How long one member may delay a write, at least 4s; then its group goes on without it.
        #[arg(long, value_parser = parse_seconds, value_name = "TIME")]
        limit: Option<u64>,
    },
    /// Forgets it: refused unless it is down, out and not needed
    Rm {
        id: OsdId,
        /// Declares its data lost.
        #[arg(long)]
        force: bool,
    },
}

/// `3` or `osd.3`.
#[derive(Clone, Copy, Debug)]
pub struct OsdId(pub u32);

impl std::str::FromStr for OsdId {
    type Err = String;
    fn from_str(text: &str) -> Result<OsdId, String> {
        let digits = text.strip_prefix("osd.").unwrap_or(text);
        digits
            .parse()
            .map(OsdId)
            .map_err(|_| format!("{text:?} is not an OSD: use its number, as 3 or osd.3"))
    }
}

fn parse_weight(text: &str) -> Result<u32, String> {
    let weight: f64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    if !(0.0..=16_384.0).contains(&weight) {
        return Err("a weight is between 0 and 16384".to_owned());
    }
    Ok((weight * 65_536.0).round() as u32)
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Domain {
    Osd,
    Host,
    Rack,
}

#[derive(Subcommand, Debug)]
pub enum PoolVerb {
    /// Makes a pool
    #[command(group(ArgGroup::new("redundancy").required(true).args(["replicas", "ec"])))]
    Create {
        name: String,
        /// Whole copies.
        #[arg(long)]
        replicas: Option<u32>,
        /// Data and parity shards, as 4+2.
        #[arg(long, value_parser = parse_erasure, value_name = "K+M")]
        ec: Option<(u32, u32)>,
        /// Copies that must be there for writes to go on.
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        min_size: u32,
        #[arg(long, value_enum, default_value = "host")]
        failure_domain: Domain,
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        pgs: u32,
        #[arg(long, default_value = "4M", value_parser = size::parse_u32)]
        object_size: u32,
    },
    /// Lists pools
    Ls,
    /// One pool
    Show { name: String },
    /// Changes a pool
    #[command(group(ArgGroup::new("change").required(true).multiple(true).args(["replicas", "min_size", "pgs"])))]
    Set {
        name: String,
        /// Whole copies that are kept from now on.
        #[arg(long)]
        replicas: Option<u32>,
        /// Copies (or shards) that must be there for writes to go on.
        #[arg(long)]
        min_size: Option<u32>,
        /// Placement groups: doubled or halved, once or several times. More are there at once, and move later; fewer when all groups are clean
        /// and those that become one have been brought together.
        #[arg(long, conflicts_with_all = ["replicas", "min_size"])]
        pgs: Option<u32>,
    },
    /// Removes a pool that no volume uses
    Rm { name: String },
}

fn parse_erasure(text: &str) -> Result<(u32, u32), String> {
    let bad = || format!("{text:?} is not K+M, such as 4+2");
    let (k, m) = text.split_once('+').ok_or_else(bad)?;
    Ok((k.parse().map_err(|_| bad())?, m.parse().map_err(|_| bad())?))
}

#[derive(Subcommand, Debug)]
pub enum PgVerb {
    /// Lists placement groups
    Ls {
        /// Only of this pool.
        #[arg(long)]
        pool: Option<String>,
        /// Only those that are not active+clean.
        #[arg(long)]
        not_clean: bool,
    },
    /// One placement group, as POOL.INDEX
    Show { pg: String },
}

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub enum ImageFormat {
    Raw,
    Qcow2,
}

#[derive(Subcommand, Debug)]
pub enum VolumeVerb {
    /// Makes a volume
    Create {
        name: String,
        #[arg(long, value_parser = size::parse)]
        size: u64,
        #[arg(long)]
        pool: String,
    },
    /// Lists volumes
    Ls,
    /// One volume
    Show { name: String },
    /// Removes a volume and its data
    Rm { name: String },
    /// Takes a volume away from the host that has it attached, dead or alive; remove its exports first
    Detach { name: String },
    /// Grows a volume, also while it is in use: a running guest sees its new size at once
    Resize {
        name: String,
        #[arg(long, value_parser = size::parse)]
        size: u64,
    },
    /// Makes a volume that begins as the snapshot is, at once and without copying
    Clone {
        /// VOLUME@NAME
        snapshot: SnapshotName,
        name: String,
    },
    /// Copies an image into a volume, which is made when it does not exist
    Import {
        /// A file, or - for a raw image on standard input.
        file: String,
        name: String,
        /// Pool of a new volume.
        #[arg(long)]
        pool: Option<String>,
        /// Size of a new volume; default: the image's.
        #[arg(long, value_parser = size::parse)]
        size: Option<u64>,
        /// Default: as the file's header says.
        #[arg(long, value_enum)]
        format: Option<ImageFormat>,
        /// Host whose gateway is used; default: where the volume is in use, else this one, else any.
        #[arg(long, visible_alias = "gateway")]
        host: Option<String>,
    },
    /// Copies a volume or a snapshot into an image
    Export {
        /// A volume, or VOLUME@NAME.
        name: String,
        /// A file, or - for a raw image on standard output.
        file: String,
        #[arg(long, value_enum, default_value = "raw")]
        format: ImageFormat,
        /// Host whose gateway is used; default: where the volume is in use, else this one, else any.
        #[arg(long, visible_alias = "gateway")]
        host: Option<String>,
    },
}

#[derive(Subcommand, Debug)]
pub enum SnapshotVerb {
    /// Takes a snapshot, also while the volume is in use: exact, and as after a power cut
    Create {
        /// VOLUME@NAME
        snapshot: SnapshotName,
    },
    /// Lists snapshots
    Ls {
        /// Only of this volume.
        volume: Option<String>,
    },
    /// Removes a snapshot that has no clones
    Rm {
        /// VOLUME@NAME
        snapshot: SnapshotName,
    },
    /// Makes a volume that is not in use what the snapshot holds
    Rollback {
        /// VOLUME@NAME
        snapshot: SnapshotName,
    },
    /// What was written since the snapshot, as ranges
    Diff {
        /// VOLUME@NAME
        snapshot: SnapshotName,
        /// A later snapshot of it, VOLUME@NAME, or a clone; default: the volume as it is now.
        other: Option<String>,
    },
}

/// `volume@name`.
#[derive(Clone, Debug)]
pub struct SnapshotName {
    pub volume: String,
    pub name: String,
}

impl std::str::FromStr for SnapshotName {
    type Err = String;
    fn from_str(text: &str) -> Result<SnapshotName, String> {
        match text.split_once('@') {
            Some((volume, name)) if valid_volume_name(volume) && valid_name(name) => {
                Ok(SnapshotName { volume: volume.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("{text:?} is not VOLUME@NAME, such as v@monday")),
        }
    }
}

impl std::fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.volume, self.name)
    }
}

#[derive(Subcommand, Debug)]
pub enum ExportVerb {
    /// Serves a volume; prints the NBD URI or the socket's path when it is ready
    #[command(group(ArgGroup::new("kind").required(true).args(["nbd", "vhost_user"])))]
    Add {
        /// A volume, or a snapshot as VOLUME@NAME, which is read-only.
        volume: String,
        #[arg(long)]
        nbd: bool,
        #[arg(long)]
        vhost_user: bool,
        #[arg(long)]
        read_only: bool,
        /// Host whose gateway serves it; default: the only one.
        #[arg(long)]
        host: Option<String>,
        /// How long to wait until it is ready.
        #[arg(long, default_value_t = 30)]
        timeout_secs: u64,
    },
    /// Lists exports
    Ls,
    /// Ends an export
    Rm {
        /// Its id, or the volume's name when that has only one export.
        export: String,
    },
}

#[derive(Subcommand, Debug)]
pub enum HostVerb {
    /// Lists hosts
    Ls,
    /// One host
    Show { name: String },
    /// What this machine offers to guests, and the engine that suits it; needs no cluster
    Check,
}

#[derive(Subcommand, Debug)]
pub enum VmVerb {
    /// Records a VM, stopped
    Create {
        name: String,
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        cpus: u32,
        #[arg(long, value_parser = size::parse)]
        memory: u64,
        /// The first is the boot disk; may be repeated.
        #[arg(long, required = true, value_name = "VOLUME")]
        disk: Vec<String>,
        #[arg(long)]
        host: Option<String>,
        /// Appended to the kernel's command line.
        #[arg(long, default_value = "", allow_hyphen_values = true)]
        kernel_args: String,
        /// What runs it; default: native on hosts with /dev/kvm and vmx or svm, qemu elsewhere.
        #[arg(long, value_enum)]
        engine: Option<Engine>,
        /// What its guest is told of the processor.
        #[arg(long, value_enum, default_value_t = CpuModel::Host)]
        cpu: CpuModel,
        /// A network card on a tap device of the host; may be repeated.
        #[arg(long, value_name = "tap=NAME[,mac=ADDRESS]")]
        nic: Vec<NicSpec>,
    },
    /// Lists VMs
    Ls,
    /// One VM
    Show { name: String },
    /// Starts it and waits until it runs
    Start {
        name: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Asks the guest to shut down and waits until it did
    Stop {
        name: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Pulls the plug
    Kill {
        name: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Gives it a disk, also while it runs
    Attach {
        vm: String,
        volume: String,
        /// What the guest sees, at most 20 bytes.
        #[arg(long, default_value = "")]
        serial: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Takes a disk away, also while it runs
    Detach {
        vm: String,
        volume: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Forgets a stopped VM; its volumes stay
    Rm { name: String },
    /// Its serial console; Ctrl-] leaves
    Console { name: String },
    /// What its console printed, the last 64 KiB
    Logs {
        name: String,
        /// Go on with new output.
        #[arg(long, short)]
        follow: bool,
    },
}

#[derive(clap::ValueEnum, Debug, Clone, Copy)]
pub enum Engine {
    Native,
    Qemu,
}

#[derive(clap::ValueEnum, Debug, Clone, Copy)]
pub enum CpuModel {
    /// Everything that the host's has.
    Host,
    /// The x86-64-v2 level and AES: the same on all hosts of the last fifteen years.
    Generic,
    /// The least that 64-bit systems need.
    Kvm64,
}

#[derive(Args, Debug, Clone, Copy)]
pub struct Wait {
    /// Return at once.
    #[arg(long)]
    pub no_wait: bool,
    /// How long to wait.
    #[arg(long, default_value_t = 120)]
    pub timeout_secs: u64,
}

#[derive(Subcommand, Debug)]
pub enum RebuildVerb {
    /// What is left to rebuild
    Status,
    /// Follows a rebuild until everything is clean
    Watch {
        /// End when nothing is left (the default).
        #[arg(long, conflicts_with = "forever")]
        until_clean: bool,
        /// Go on when everything is clean.
        #[arg(long)]
        forever: bool,
    },
    /// Changes how fast rebuilds may go, besides what clients leave
    Set {
        /// Bytes per second at each OSD, at least 4M; 0: no limit.
        #[arg(long, value_parser = size::parse, value_name = "S")]
        max_rate: u64,
    },
}

#[derive(Subcommand, Debug)]
pub enum ScrubVerb {
    /// Has placement groups scrubbed now: all, those of a pool, or one
    Start {
        /// Only of this pool.
        #[arg(long, conflicts_with = "pg")]
        pool: Option<String>,
        /// Only this placement group, as POOL.INDEX.
        #[arg(long)]
        pg: Option<String>,
        /// Also read every block against its checksum, and parity against data.
        #[arg(long)]
        deep: bool,
    },
    /// When placement groups were scrubbed, what runs, and what was found
    Status {
        /// Only of this pool.
        #[arg(long)]
        pool: Option<String>,
    },
    /// Changes how often scrubs run by themselves, and how fast
    Set {
        /// How often versions and checksums are compared, as 90s, 45m, 24h or 7d; 0: never by itself.
        #[arg(long, value_parser = parse_seconds, value_name = "TIME")]
        interval: Option<u64>,
        /// How often everything is read.
        #[arg(long, value_parser = parse_seconds, value_name = "TIME")]
        deep_interval: Option<u64>,
        /// Bytes per second at each OSD, at least 1M.
        #[arg(long, value_parser = size::parse, value_name = "S")]
        max_rate: Option<u64>,
    },
}

fn parse_seconds(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is not a time: use a whole number with s, m, h or d, such as 24h");
    let units = [("s", 1), ("m", 60), ("h", 3_600), ("d", 86_400)];
    let unit = units.iter().find_map(|(unit, length)| Some((text.strip_suffix(unit)?, *length)));
    let (digits, length) = unit.unwrap_or((text, 1));
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let n: u64 = digits.parse().map_err(|_| bad())?;
    n.checked_mul(length).ok_or_else(|| format!("{text:?} is too long"))
}
