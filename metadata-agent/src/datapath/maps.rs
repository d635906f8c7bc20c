//! Typed wrappers around the BPF maps.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aya::Ebpf;
use aya::maps::xdp::DevMapHash;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, ProgramArray, RingBuf};
use aya::programs::ProgramFd;
use metadata_ebpf::abi::{
    AttachmentState, Client, ClientKey, GuestShares, MacWord, Port, PortKey, Refusals, Settings, heartbeat,
    names,
};
use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use metadata_ebpf::reason::Reason;
use nix::time::{ClockId, clock_gettime};

use super::DatapathError;
use super::pins::Pins;
use super::refusals::RefusalRecord;
use crate::ids::{IfIndex, MacAddress};
use crate::sys::SharedWords;

/// `BPF_ANY` of linux/bpf.h.
const ANY: u64 = 0;

/// The clock that the programs read, `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug)]
pub struct Clock;

impl Clock {
    /// Returns nanoseconds like `bpf_ktime_get_ns`.
    #[must_use]
    pub fn now_ns() -> u64 {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
        u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
    }
}

pub(super) struct Maps {
    config: Array<MapData, Settings>,
    ports: HashMap<MapData, PortKey, Port>,
    attachments: HashMap<MapData, u32, AttachmentState>,
    shares: HashMap<MapData, u32, GuestShares>,
    refusals: HashMap<MapData, u32, Refusals>,
    devices: DevMapHash<MapData>,
}

impl Maps {
    pub(crate) fn take(ebpf: &mut Ebpf) -> Result<Self, DatapathError> {
        Ok(Self {
            config: typed(take(ebpf, names::CONFIG)?, names::CONFIG)?,
            ports: typed(take(ebpf, names::PORTS)?, names::PORTS)?,
            attachments: typed(take(ebpf, names::ATTACHMENTS)?, names::ATTACHMENTS)?,
            shares: typed(take(ebpf, names::SHARES)?, names::SHARES)?,
            refusals: typed(take(ebpf, names::REFUSALS)?, names::REFUSALS)?,
            devices: typed(take(ebpf, names::DEVICES)?, names::DEVICES)?,
        })
    }

    pub(crate) fn settings(&self) -> Result<Settings, DatapathError> {
        self.config.get(&0, 0).map_err(map_error("read", names::CONFIG))
    }

    pub(crate) fn put_settings(&mut self, settings: Settings) -> Result<(), DatapathError> {
        self.config.set(0, settings, ANY).map_err(map_error("write", names::CONFIG))
    }

    /// Returns an id that was never used before. The counter is written back before the id is used.
    pub(crate) fn next_attachment(&mut self) -> Result<AttachmentId, DatapathError> {
        let mut settings = self.settings()?;
        let next = settings.next_attachment.max(1);
        settings.next_attachment = next.wrapping_add(1);
        self.put_settings(settings)?;
        AttachmentId::new(next).ok_or(DatapathError::Missing { name: "attachment id" })
    }

    pub(crate) fn port(&self, key: PortKey) -> Result<Option<Port>, DatapathError> {
        optional(self.ports.get(&key, 0)).map_err(map_error("read", names::PORTS))
    }

    pub(crate) fn ports(&self) -> Result<Vec<(PortKey, Port)>, DatapathError> {
        self.ports.iter().collect::<Result<_, _>>().map_err(map_error("read", names::PORTS))
    }

    pub(crate) fn put_port(&mut self, key: PortKey, port: &Port) -> Result<(), DatapathError> {
        self.ports.insert(key, port, ANY).map_err(map_error("write", names::PORTS))
    }

    /// Makes room for an attachment: its state, its refusals, and the shares of its guests. An
    /// attachment that an earlier agent left under the same key is removed. Replies to guests that
    /// share it come from `mac`, the interface's own.
    pub(crate) fn put_attachment(
        &mut self,
        key: PortKey,
        id: AttachmentId,
        shared: bool,
        mac: Option<MacAddress>,
    ) -> Result<(), DatapathError> {
        if let Some(earlier) = self.port(key)?.and_then(|port| AttachmentId::new(port.attachment)) {
            self.remove_port(key, earlier)?;
        }
        if shared {
            let put = self.shares.insert(id.get(), GuestShares::UNUSED, ANY);
            put.map_err(map_error("write", names::SHARES))?;
        }
        let put = self.refusals.insert(id.get(), Refusals::NONE, ANY);
        put.map_err(map_error("write", names::REFUSALS))?;
        let metadata_mac = mac.filter(|_| shared).map_or(MacWord(0), |mac| MacWord::new(mac.0));
        self.attachments
            .insert(id.get(), AttachmentState::new(&key, metadata_mac), ANY)
            .map_err(map_error("write", names::ATTACHMENTS))
    }

    /// Records the interface that carries an attachment, for as long as that interface exists. The
    /// thread must be in the interface's namespace.
    ///
    /// # Errors
    /// There is no such interface.
    pub(crate) fn put_device(&mut self, id: AttachmentId, index: IfIndex) -> Result<(), DatapathError> {
        let put = self.devices.insert(id.get(), index.0, None, ANY);
        put.map_err(|source| DatapathError::Device { index, source: Box::new(source) })
    }

    /// Returns true if the interface that [`Self::put_device`] recorded still exists.
    pub(crate) fn has_device(&self, id: AttachmentId) -> Result<bool, DatapathError> {
        let device = optional(self.devices.get(id.get(), 0));
        Ok(device.map_err(map_error("read", names::DEVICES))?.is_some())
    }

    pub(crate) fn remove_port(&mut self, key: PortKey, id: AttachmentId) -> Result<(), DatapathError> {
        ignore_absent(self.ports.remove(&key)).map_err(map_error("remove from", names::PORTS))?;
        ignore_absent(self.devices.remove(id.get())).map_err(map_error("remove from", names::DEVICES))?;
        ignore_absent(self.shares.remove(&id.get())).map_err(map_error("remove from", names::SHARES))?;
        ignore_absent(self.refusals.remove(&id.get())).map_err(map_error("remove from", names::REFUSALS))?;
        ignore_absent(self.attachments.remove(&id.get()))
            .map_err(map_error("remove from", names::ATTACHMENTS))
    }
}

/// The slots of the programs that dispatchers tail-call.
pub(super) struct Slots(ProgramArray<MapData>);

pub(super) fn slots(ebpf: &mut Ebpf) -> Result<Slots, DatapathError> {
    typed(take(ebpf, names::PROGRAMS)?, names::PROGRAMS).map(Slots)
}

impl Slots {
    /// Puts a program into a slot, replacing the previous one.
    pub(crate) fn put(&mut self, slot: u32, program: &ProgramFd) -> Result<(), DatapathError> {
        self.0.set(slot, program, ANY).map_err(map_error("write", names::PROGRAMS))
    }
}

/// The agent's heartbeats, in the memory of `MD_HEARTBEAT`.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    words: SharedWords,
}

impl Heartbeat {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        Self::map(heartbeat_descriptor(pins)?.as_fd())
    }

    /// Maps the memory of the map behind a descriptor. This needs no privilege.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn map(map: BorrowedFd<'_>) -> Result<Self, DatapathError> {
        let words = SharedWords::map_array(map, heartbeat::COUNT as usize);
        Ok(Self { words: words.map_err(|source| DatapathError::Mmap { map: names::HEARTBEAT, source })? })
    }

    /// Writes the heartbeat of the control runtime.
    pub(crate) fn beat_control(&self) {
        self.word(heartbeat::CONTROL).store(Clock::now_ns(), Ordering::Relaxed);
    }

    /// Writes the heartbeat of the data runtime: the time, or the last heartbeat of the control
    /// runtime if that is earlier. The programs read only this one.
    pub(crate) fn beat_data(&self) {
        let control = self.word(heartbeat::CONTROL).load(Ordering::Relaxed);
        self.word(heartbeat::DATA).store(Clock::now_ns().min(control), Ordering::Relaxed);
    }

    /// Marks the agent as absent: from now on packets are left to the host's own path, until the
    /// control runtime has another heartbeat.
    pub(crate) fn stop(&self) {
        // First, so that the data runtime's next heartbeat is absent too.
        self.word(heartbeat::CONTROL).store(0, Ordering::Relaxed);
        self.word(heartbeat::DATA).store(0, Ordering::Relaxed);
    }

    fn word(&self, element: u32) -> &AtomicU64 {
        &self.words[element as usize]
    }
}

pub(super) fn heartbeat_descriptor(pins: &Pins) -> Result<OwnedFd, DatapathError> {
    let map = pinned(pins, names::HEARTBEAT)?;
    map.fd()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|source| DatapathError::Descriptor { map: names::HEARTBEAT, source })
}

/// Statistics of the kernel about a client.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClientRecord {
    pub address: ClientAddress,
    pub client: Client,
}

/// Read access to counters, refusals and clients.
pub(crate) struct Counters {
    stats: PerCpuArray<MapData, u64>,
    refusals: HashMap<MapData, u32, Refusals>,
    clients: HashMap<MapData, ClientKey, Client>,
}

impl Counters {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        Ok(Self {
            stats: typed(Map::PerCpuArray(pinned(pins, names::STATS)?), names::STATS)?,
            refusals: typed(Map::HashMap(pinned(pins, names::REFUSALS)?), names::REFUSALS)?,
            clients: typed(Map::LruHashMap(pinned(pins, names::CLIENTS)?), names::CLIENTS)?,
        })
    }

    /// Returns the number of packets by reason, over all CPUs, since the maps were created.
    ///
    /// # Errors
    /// The map operation fails.
    pub(crate) fn packets(&self) -> Result<Vec<(Reason, u64)>, DatapathError> {
        let count = |reason: &Reason| -> Result<(Reason, u64), DatapathError> {
            let per_cpu = self.stats.get(&reason.index(), 0).map_err(map_error("read", names::STATS))?;
            Ok((*reason, per_cpu.iter().sum()))
        };
        Reason::ALL.iter().map(count).collect()
    }

    /// Returns the refused packets of an attachment, if there are any.
    ///
    /// # Errors
    /// The map operation fails.
    pub(crate) fn refusals(&self, id: AttachmentId) -> Result<Option<RefusalRecord>, DatapathError> {
        let refusals = optional(self.refusals.get(&id.get(), 0));
        let refusals = refusals.map_err(map_error("read", names::REFUSALS))?;
        Ok(refusals.as_ref().and_then(RefusalRecord::from_entry))
    }

    /// Returns all client records, in no particular order.
    ///
    /// # Errors
    /// The map operation fails.
    pub(crate) fn clients(&self) -> Result<Vec<ClientRecord>, DatapathError> {
        let mut records = Vec::new();
        for entry in &self.clients {
            let (key, client) = entry.map_err(map_error("read", names::CLIENTS))?;
            records.extend(
                ClientAddress::from_identity(key.identity).map(|address| ClientRecord { address, client }),
            );
        }
        Ok(records)
    }
}

/// Opens the pinned ring buffer of refused packets.
pub(super) fn refusal_events(pins: &Pins) -> Result<RingBuf<MapData>, DatapathError> {
    typed(Map::RingBuf(pinned(pins, names::REFUSAL_EVENTS)?), names::REFUSAL_EVENTS)
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, DatapathError> {
    ebpf.take_map(name).ok_or(DatapathError::Missing { name })
}

fn pinned(pins: &Pins, name: &'static str) -> Result<MapData, DatapathError> {
    MapData::from_pin(pins.map(name)).map_err(map_error("open", name))
}

fn typed<T: TryFrom<Map, Error = MapError>>(map: Map, name: &'static str) -> Result<T, DatapathError> {
    map.try_into().map_err(map_error("use", name))
}

fn map_error(operation: &'static str, map: &'static str) -> impl Fn(MapError) -> DatapathError {
    move |source| DatapathError::Map { operation, map, source: Box::new(source) }
}

fn optional<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `BPF_MAP_DELETE_ELEM` returns ENOENT for a missing key, and aya passes it on unchanged.
fn ignore_absent(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(MapError::KeyNotFound) => Ok(()),
        result => result,
    }
}
