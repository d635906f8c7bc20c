//! Programs with two instructions that return the same verdict for every packet. They stand for
//! neighbours on the same hook and measure the cost of calling any program. One is for TC, one for
//! XDP.

use std::mem;

use aya::Ebpf;
use aya::programs::tc::{NlOptions, TcAttachOptions};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode};
use object::write::{Object, StandardSegment, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope};

use crate::netns::Netns;

/// A verdict of linux/pkt_cls.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// `TC_ACT_UNSPEC`: the next program decides.
    Next,
    /// `TC_ACT_SHOT`.
    Drop,
}

impl Verdict {
    const fn number(self) -> i32 {
        match self {
            Self::Next => -1,
            Self::Drop => 2,
        }
    }
}

/// The position of a program on an interface's ingress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// With TCX, before all present programs.
    First,
    /// With TCX, after all present programs.
    Last,
    /// As a filter with this priority on the present qdisc.
    Filter(u16),
}

/// A loaded TC program.
#[derive(Debug)]
pub struct TinyProgram {
    ebpf: Ebpf,
    name: String,
}

impl TinyProgram {
    /// Loads the program under a name.
    #[must_use]
    pub fn load(name: &str, verdict: Verdict) -> Self {
        let ebpf = Ebpf::load(&object_file(name, b"classifier", verdict.number()))
            .unwrap_or_else(|e| panic!("load {name}: {e}"));
        let mut this = Self { ebpf, name: name.to_owned() };
        this.program().load().unwrap_or_else(|e| panic!("load {name}: {e}"));
        this
    }

    pub fn program(&mut self) -> &mut SchedClassifier {
        let Self { ebpf, name } = self;
        let program = ebpf.program_mut(name).and_then(|program| program.try_into().ok());
        program.unwrap_or_else(|| panic!("no {name}"))
    }

    /// Attaches it to an interface's ingress. With TCX it stays as long as the value; a filter
    /// stays until it is deleted.
    pub fn attach(&mut self, netns: &Netns, interface: &str, place: Place) {
        let name = self.name.clone();
        let program = self.program();
        netns
            .enter(|| {
                let options = match place {
                    Place::First => TcAttachOptions::TcxOrder(LinkOrder::first()),
                    Place::Last => TcAttachOptions::TcxOrder(LinkOrder::last()),
                    Place::Filter(priority) => {
                        TcAttachOptions::Netlink(NlOptions { priority, ..NlOptions::default() })
                    }
                };
                let id = program.attach_with_options(interface, TcAttachType::Ingress, options)?;
                if let Place::Filter(_) = place {
                    // Its drop would detach in the namespace of the dropping thread.
                    mem::forget(program.take_link(id)?);
                }
                Ok::<(), ProgramError>(())
            })
            .unwrap_or_else(|e| panic!("attach {name} to {interface}: {e}"));
    }
}

/// A loaded XDP program that passes every packet.
#[derive(Debug)]
pub struct TinyXdp {
    ebpf: Ebpf,
}

impl TinyXdp {
    const NAME: &str = "tiny_xdp";
    /// `XDP_PASS` of linux/bpf.h.
    const PASS: i32 = 2;

    #[must_use]
    pub fn load() -> Self {
        let object = object_file(Self::NAME, b"xdp", Self::PASS);
        let mut ebpf = Ebpf::load(&object).unwrap_or_else(|e| panic!("load an XDP program: {e}"));
        let program = ebpf.program_mut(Self::NAME).and_then(|program| program.try_into().ok());
        let program: &mut Xdp = program.unwrap_or_else(|| panic!("no XDP program"));
        program.load().unwrap_or_else(|e| panic!("load an XDP program: {e}"));
        Self { ebpf }
    }

    /// Attaches it to an interface of the calling thread's namespace until the value is dropped.
    ///
    /// # Errors
    /// Returns an error if the driver does not support this mode.
    pub fn attach(&mut self, interface: &str, mode: XdpMode) -> Result<(), ProgramError> {
        let program = self.ebpf.program_mut(Self::NAME).and_then(|program| program.try_into().ok());
        let program: &mut Xdp = program.unwrap_or_else(|| panic!("no XDP program"));
        program.attach(interface, mode).map(drop)
    }
}

/// Builds an object file as a compiler would, because the loader accepts nothing else.
fn object_file(name: &str, section: &[u8], verdict: i32) -> Vec<u8> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let segment = object.segment_name(StandardSegment::Text).to_vec();
    let license = object.add_section(segment.clone(), b"license".to_vec(), SectionKind::Data);
    object.append_section_data(license, b"GPL\0", 1);
    let code = object.add_section(segment, section.to_vec(), SectionKind::Text);
    let symbol = object.add_symbol(Symbol {
        name: name.into(),
        value: 0,
        size: 0,
        kind: SymbolKind::Text,
        scope: SymbolScope::Dynamic,
        weak: false,
        section: SymbolSection::Section(code),
        flags: SymbolFlags::None,
    });
    object.add_symbol_data(symbol, code, &instructions(verdict), 8);
    object.write().unwrap_or_else(|e| panic!("assemble {name}: {e}"))
}

/// Encodes `r0 = verdict; exit` as in linux/bpf.h.
fn instructions(verdict: i32) -> [u8; 16] {
    let [a, b, c, d] = verdict.to_le_bytes();
    [0xb7, 0, 0, 0, a, b, c, d, 0x95, 0, 0, 0, 0, 0, 0, 0]
}
