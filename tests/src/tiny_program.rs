//! Programs of two instructions, the measure of what calling any program costs: one for TC, one for XDP.

use anyhow::Context as _;
use aya::Ebpf;
use aya::programs::{SchedClassifier, Xdp};
use object::write::{Object, StandardSegment, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope};

const NAME: &str = "md_empty";
/// `TC_ACT_UNSPEC` of linux/pkt_cls.h.
const TC_ACT_UNSPEC: i32 = -1;
/// `XDP_PASS` of linux/bpf.h.
const XDP_PASS: i32 = 2;

/// The program, in the kernel.
pub struct EmptyProgram {
    ebpf: Ebpf,
}

impl EmptyProgram {
    pub fn load() -> anyhow::Result<Self> {
        let mut ebpf =
            Ebpf::load(&object_file(b"classifier", TC_ACT_UNSPEC)?).context("load the empty program")?;
        program(&mut ebpf)?.load().context("load the empty program")?;
        Ok(Self { ebpf })
    }

    pub fn program(&mut self) -> anyhow::Result<&mut SchedClassifier> {
        program(&mut self.ebpf)
    }
}

fn program(ebpf: &mut Ebpf) -> anyhow::Result<&mut SchedClassifier> {
    Ok(ebpf.program_mut(NAME).context("the empty program")?.try_into()?)
}

/// The same for XDP.
pub struct EmptyXdp {
    ebpf: Ebpf,
}

impl EmptyXdp {
    pub fn load() -> anyhow::Result<Self> {
        let ebpf = Ebpf::load(&object_file(b"xdp", XDP_PASS)?).context("load the empty XDP program")?;
        let mut this = Self { ebpf };
        this.program()?.load().context("load the empty XDP program")?;
        Ok(this)
    }

    pub fn program(&mut self) -> anyhow::Result<&mut Xdp> {
        Ok(self.ebpf.program_mut(NAME).context("the empty XDP program")?.try_into()?)
    }
}

/// `r0 = verdict; exit`, as linux/bpf.h encodes it.
fn code(verdict: i32) -> [u8; 16] {
    let [a, b, c, d] = verdict.to_le_bytes();
    [0xb7, 0, 0, 0, a, b, c, d, 0x95, 0, 0, 0, 0, 0, 0, 0]
}

/// As a compiler would leave it, for a loader that takes nothing else.
fn object_file(section: &[u8], verdict: i32) -> anyhow::Result<Vec<u8>> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let segment = object.segment_name(StandardSegment::Text).to_vec();
    let license = object.add_section(segment.clone(), b"license".to_vec(), SectionKind::Data);
    object.append_section_data(license, b"GPL\0", 1);
    let code_section = object.add_section(segment, section.to_vec(), SectionKind::Text);
    let symbol = object.add_symbol(Symbol {
        name: NAME.into(),
        value: 0,
        size: 0,
        kind: SymbolKind::Text,
        scope: SymbolScope::Dynamic,
        weak: false,
        section: SymbolSection::Section(code_section),
        flags: SymbolFlags::None,
    });
    object.add_symbol_data(symbol, code_section, &code(verdict), 8);
    object.write().context("assemble the empty program")
}
